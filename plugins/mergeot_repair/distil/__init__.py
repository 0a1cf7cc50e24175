"""The repair ``distil``: training towards the ensemble of the sources, on inputs without labels."""
