"""Updates of several local steps: their drift from the gradient, and their labels."""
