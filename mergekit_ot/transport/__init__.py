"""Measures, couplings and the barycenter problem: knows nothing of networks."""
