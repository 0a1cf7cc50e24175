"""A symmetry that the core does not know, registered by a distribution of its own."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ot import hookimpl


@hookimpl
def mergeot_symmetries() -> Mapping[str, str]:
    """Return the scales."""
    return {"scale": "mergeot_scales.symmetry:Scale"}
