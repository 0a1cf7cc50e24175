"""Symmetries: what may be done to neurons without changing the function, and its proof."""
