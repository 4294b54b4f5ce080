"""The losses that the attack loop lowers."""
