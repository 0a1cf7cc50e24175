"""Networks come from anywhere, a tensor at a time."""
