"""Networks that are composed at random of the supported operations."""
