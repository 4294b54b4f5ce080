"""What several local steps change for the attack."""
