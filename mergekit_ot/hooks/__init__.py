"""The door for plugins."""
