"""The message between client and server: the shared update, its files, and how a client trains."""
