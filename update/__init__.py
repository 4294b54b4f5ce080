"""What both sides know: the shared update, the model it was computed on, and how a batch's gradient is averaged."""
