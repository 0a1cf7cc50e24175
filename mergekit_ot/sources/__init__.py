"""The door for names: architectures, data and files become sources."""
