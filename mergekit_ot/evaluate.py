"""The former place of `mergekit_ot.evaluation`: a module called like a public name would hide it."""

from __future__ import annotations

from mergekit_ot.evaluation import barrier, evaluate

__all__ = ["barrier", "evaluate"]
