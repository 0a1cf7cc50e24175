"""Sources of different depth: the shallower ones get blocks that compute nothing, and are fused as deep ones."""
