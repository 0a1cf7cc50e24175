"""Recipes of other tools, read as recipes of ours."""
