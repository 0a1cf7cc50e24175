"""Re-estimates BatchNorm statistics on calibration data."""

from __future__ import annotations

from torch import Tensor

from mergekit_ot import AbstractRepair, RepairContext
from mergeot_repair.control import check_statistics, norms_of, reestimated


class ResetRepair(AbstractRepair):
    """Replaces running means and variances by those of the calibration data (cumulative average, momentum None).

    The heaviest source is the control: the same procedure must leave its predictions as they are.
    """

    needs_data = True

    def repair(self, context: RepairContext) -> dict[str, Tensor]:
        """Returns the fused state with new statistics; unchanged where the model has no BatchNorm.

        Raises:
            DataError: The procedure changes an untouched source, so the calibration data do not fit the models.
        """
        fused = context.instance(context.fused)
        if not norms_of(fused):
            return dict(context.fused)
        check_statistics(context, "reset")
        return reestimated(fused, context.batches)
