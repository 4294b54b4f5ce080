"""What moves, how far, and when it ends."""
