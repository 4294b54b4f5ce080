"""What the attack loop lowers."""
