"""Downwards: from the inputs of one layer to those of the layers below it."""
