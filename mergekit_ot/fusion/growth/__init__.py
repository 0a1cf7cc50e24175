"""Fused networks with more neurons than their sources: which hidden layers grow, and what holds the result."""
