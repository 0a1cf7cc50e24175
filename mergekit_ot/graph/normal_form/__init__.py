"""Normal forms: exact rewrites of a state into another state of the same architecture."""
