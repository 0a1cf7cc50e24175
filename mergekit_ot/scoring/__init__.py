"""What a network is worth: scores, paths, planes."""
