"""Reads captured programs: their linear maps, what stands on an axis, and staged runs."""
