"""Residual streams behind norms: rebuilt from the sources' streams side by side, with every map that touches them."""
