"""What the server does with a shared update. Nothing here takes true images, true labels, or what follows from them."""
