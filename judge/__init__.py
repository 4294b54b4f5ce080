"""Where truth and reconstruction meet again: figures, pictures, and the run directory."""
