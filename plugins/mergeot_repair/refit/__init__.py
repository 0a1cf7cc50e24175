"""The repair `refit`: chooses neurons, and fits the linear maps of the fused model to its sources."""
