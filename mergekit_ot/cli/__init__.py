"""The command ``mergeot``."""
