"""Pictures of curves, planes, groups and modules."""
