"""The straight path between two networks: as they are, and with the neurons of one in the order of the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mergekit_ot import FusionInputs, FusionOptions, PluginManager, SourceModel, barrier, fuse_with
from mergeot_diagnose.samples import Samples

_POINTS = 5
# A path that rises by less is as good as flat: points of the error, or a share of the loss where there are no classes.
_FLAT_ERROR, _FLAT_LOSS = 2.0, 0.1


@dataclass(frozen=True)
class Path:
    """A straight path, evaluated at a few points.

    Attributes:
        t: From 0 (the first network) to 1.
        loss: Mean loss at each t.
        accuracy: In percent at each t, or None.
        loss_barrier: How far the loss rises above the line between both ends.
        error_barrier: The same of the error, in percent points, or None.
    """

    t: tuple[float, ...]
    loss: tuple[float, ...]
    accuracy: tuple[float, ...] | None
    loss_barrier: float
    error_barrier: float | None

    @property
    def is_flat(self) -> bool:
        """Whether there is no barrier worth the name.

        Example:
            >>> Path((0.0, 0.5, 1.0), (0.3, 0.9, 0.3), (90.0, 70.0, 90.0), 0.6, 20.0).is_flat
            False
        """
        if self.error_barrier is not None:
            return self.error_barrier <= _FLAT_ERROR
        return self.loss_barrier <= _FLAT_LOSS * (self.loss[0] + self.loss[-1]) / 2

    @property
    def words(self) -> str:
        """The barrier in words."""
        loss = f"{self.loss_barrier:.3g} of the loss"
        return loss if self.error_barrier is None else f"{self.error_barrier:.1f} points of the error, {loss}"

    def as_json(self) -> dict[str, Any]:
        """Returns the path as plain data, under the names of ``mergeot barrier --json``."""
        return dict(vars(self))


def naive_path(model: SourceModel, other: SourceModel, samples: Samples, targets: Sequence[Tensor]) -> Path:
    """Returns the path between two networks as they are."""
    return _path(model.instance(), dict(model.state), dict(other.state), samples, targets)


def aligned_path(
    pair: Sequence[SourceModel], samples: Samples, targets: Sequence[Tensor], solver: str, manager: PluginManager
) -> Path:
    """Returns the path from the first network to the second in the first one's order."""
    inputs = FusionInputs(pair, data=samples.inputs)
    options = FusionOptions(solver=solver, calibration_size=samples.count)
    result = fuse_with(inputs, options, manager=manager)
    model, first = result.aligned_module(), pair[0].state
    start, end = (_like(result.aligned_state(number), first) for number in (0, 1))
    return _path(model, start, end, samples, targets)


def _like(state: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # What weights of a normal form are made with may be more precise than the file.
    return {name: each.to(reference[name].dtype) if name in reference else each for name, each in state.items()}


def _path(
    model: Any, first: Mapping[str, Tensor], second: Mapping[str, Tensor], samples: Samples, targets: Sequence[Tensor]
) -> Path:
    curve = barrier(model, first, second, samples.labelled(targets), _POINTS)
    accuracy = curve["accuracy"]
    return Path(
        tuple(curve["t"]),
        tuple(curve["loss"]),
        None if accuracy is None else tuple(accuracy),
        curve["loss_barrier"],
        curve["error_barrier"],
    )
