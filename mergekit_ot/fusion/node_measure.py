"""What a node measure is: it describes the neurons of a group in every source."""

from __future__ import annotations

import abc

from mergekit_ot.fusion.group_view import GroupView
from mergekit_ot.transport.measure import NeuronMeasure


class AbstractNodeMeasure(abc.ABC):
    """Describes the neurons of a group in every source as measures with a common support space.

    Attributes:
        needs_data: Whether calibration data are needed.
    """

    needs_data: bool = False

    @abc.abstractmethod
    def measure(self, view: GroupView) -> tuple[NeuronMeasure, ...]:
        """Returns one measure per source; all supports have the same number of columns."""
