"""Joins graph and transport: plans, alignment, the engine, repair."""
