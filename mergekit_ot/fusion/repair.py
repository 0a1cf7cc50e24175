"""Repairs: what is done to the fused model after the couplings. Each is a plugin."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class RepairContext:
    """What a repair works with.

    Attributes:
        instance: Gives a fresh instance of the fused architecture, in evaluation mode, that holds a state.
        fused: State of the fused model.
        aligned: State of each source in the fused model's neuron order.
        model_weights: One per source.
        batches: Calibration inputs, to be iterated as often as needed; each item is a tuple of positional inputs.
    """

    instance: Callable[[Mapping[str, Tensor]], nn.Module]
    fused: Mapping[str, Tensor]
    aligned: tuple[Mapping[str, Tensor], ...]
    model_weights: tuple[float, ...]
    batches: Iterable[tuple[Tensor, ...]]


class AbstractRepair(abc.ABC):
    """Changes the fused state without labels or training.

    Attributes:
        needs_data: Whether calibration data are needed.
    """

    needs_data: bool = True

    @abc.abstractmethod
    def repair(self, context: RepairContext) -> dict[str, Tensor]:
        """Returns the repaired state of the fused model.

        Raises:
            MergeotError: The repair changes an untouched source, which is its control.
        """
