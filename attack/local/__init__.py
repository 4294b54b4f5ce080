"""Updates of several local steps: what one gradient would give, and their labels."""
