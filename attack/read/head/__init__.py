"""All images of a linear head at once."""
