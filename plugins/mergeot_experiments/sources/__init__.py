"""What is fused: images, networks and their training, kept in a cache."""
