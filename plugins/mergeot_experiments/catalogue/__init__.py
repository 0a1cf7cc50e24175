"""The experiments, described as data: networks, settings and methods, by name."""
