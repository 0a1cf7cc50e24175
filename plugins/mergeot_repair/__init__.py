"""Repairs: statistics and linear maps of the fused model, set right without labels; one of them trains."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ot import hookimpl


@hookimpl
def mergeot_repairs() -> Mapping[str, str]:
    """Returns the repairs of this package."""
    return {
        "reset": "mergeot_repair.reset:ResetRepair",
        "repair": "mergeot_repair.moments:MomentsRepair",
        "refit": "mergeot_repair.refit.refit:RefitRepair",
        "rescale": "mergeot_repair.rescale:RescaleRepair",
        "distil": "mergeot_repair.distil.distil:DistilRepair",
    }
