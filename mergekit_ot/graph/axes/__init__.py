"""The axis algebra: expressions of what an axis is made of, and their unification."""
