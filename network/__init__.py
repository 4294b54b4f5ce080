"""The model as both sides know it; nothing of the project is imported here."""
