"""Which images are in the batch? Single images read from one averaged gradient."""
