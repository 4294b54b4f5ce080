"""What the client does: the batch's update, and its defences. Nothing here is ever imported by the attack."""
