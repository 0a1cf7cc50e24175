"""What a repair is worth, without labels: on inputs that it was not fitted to, is it nearer to the sources together?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.graph.capture.outputs import outputs_of

# A fused network that is so near to the ensemble computes it: nothing is left to repair.
_NOTHING_LEFT = 1e-9
# So many inputs that all are of one class say something about the data.
_TELLING = 20


@dataclass(frozen=True)
class Distance:
    """How far a network's outputs are from those of the ensemble of the sources, as shares of how much these vary.

    Attributes:
        plain: Of the outputs as they stand.
        scaled: Of the outputs when all are scaled by the one number that brings them nearest, what all classes of a
            sample share left out: what matters where only the largest output counts, as in classification.
    """

    plain: float
    scaled: float

    def is_no_farther(self, other: Distance) -> bool:
        """Whether neither distance is larger than the other's; one that is not finite is."""
        return self.plain <= other.plain and self.scaled <= other.scaled

    def __str__(self) -> str:
        return f"{self.plain:.3g}, {self.scaled:.3g} up to scale"


@dataclass(frozen=True)
class RepairComparison:
    """A repaired network beside the unrepaired one and the sources, on calibration inputs that were held out.

    Attributes:
        repair: Name of the repair.
        held_out: How many inputs were held out.
        repaired: Distance of the repaired network from the ensemble of the sources.
        unrepaired: Distance of the fused network without the repair.
        sources: Distance of each source.
        is_one_sided: Whether the ensemble takes all held-out inputs for one class of several.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mergekit_ot import fuse
        >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2)]
        >>> found = fuse(nets, data=[torch.randn(200, 4)], repair="refit").repair_comparison
        >>> found.is_written == found.repaired.is_no_farther(found.unrepaired)
        True
    """

    repair: str
    held_out: int
    repaired: Distance
    unrepaired: Distance
    sources: tuple[Distance, ...]
    is_one_sided: bool = False

    @property
    def is_needed(self) -> bool:
        """Whether the fused network differs from the ensemble at all without the repair."""
        return not self.unrepaired.plain <= _NOTHING_LEFT

    @property
    def is_written(self) -> bool:
        """Whether the repaired network is the result; else it is the one without the repair."""
        return self.is_needed and self.repaired.is_no_farther(self.unrepaired)

    @property
    def sentence(self) -> str:
        """What was measured, in words."""
        said = (
            f"Distance from the ensemble of the sources on {self.held_out:,} held-out calibration inputs: "
            f"{self.repaired} with the repair; {self.unrepaired} without"
        )
        if not self.sources:
            return f"{said}."
        nearest = min(range(len(self.sources)), key=lambda number: self.sources[number].plain)
        return f"{said}; {self.sources[nearest]} for the nearest source (number {nearest + 1})."

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user has to know."""
        found = []
        if self.is_needed and not self.is_written:
            found.append(
                f"The repair '{self.repair}' is NOT in the result: on calibration inputs that it was not fitted to, "
                "the network is farther from its sources with it than without, so the result is without. "
                f"{self.sentence} Give more calibration data (--data, --calibration-size), as the sources were trained "
                "on, or --repair none."
            )
        if self.is_written and self.is_one_sided:
            found.append(
                f"The sources take all {self.held_out:,} held-out calibration inputs for the same class: a repair "
                "learns little about the others from such data. Give inputs of all classes with --data."
            )
        return tuple(found)

    def as_json(self) -> dict[str, object]:
        """Returns plain numbers, for a file or a terminal."""
        return {
            "name": self.repair,
            "written": self.is_written,
            "held_out": self.held_out,
            "distance": vars(self.repaired),
            "distance_without": vars(self.unrepaired),
            "distances_of_sources": [vars(distance) for distance in self.sources],
        }


class _Outputs:
    """Sums over batches of a network's outputs and the ensemble's, from which distances follow."""

    def __init__(self) -> None:
        self.missed = self.own = self.shared = self.goal = 0.0

    def add(self, own: Float[Tensor, ...], goal: Float[Tensor, ...]) -> None:
        self.missed += float((own - goal).square().sum())
        axis = _class_axis(goal)
        if axis is not None:
            own, goal = own - own.mean(axis, keepdim=True), goal - goal.mean(axis, keepdim=True)
        self.own += float(own.square().sum())
        self.shared += float((own * goal).sum())
        self.goal += float(goal.square().sum())

    def distance(self, variation: float) -> Distance:
        """Returns the distances of what was added; `variation` is how much the ensemble's outputs vary."""
        tiny = torch.finfo(torch.float64).tiny
        agreed = max(self.shared, 0.0) ** 2 / max(self.own, tiny)
        return Distance(self.missed / max(variation, tiny), max(0.0, self.goal - agreed) / max(self.goal, tiny))


def compare_repair(
    name: str,
    states: tuple[Mapping[str, Tensor], Mapping[str, Tensor]],
    target: SourceModel,
    sources: Sequence[SourceModel],
    model_weights: Sequence[float],
    held_out: Iterable[tuple[Tensor, ...]],
) -> RepairComparison | None:
    """Compares a fused network with and without a repair; None where it has no outputs that are numbers.

    Args:
        name: Of the repair.
        states: Of the fused network, repaired and not.
        target: Its architecture.
        sources: The sources, whose weighted mean output is the ensemble's.
        model_weights: One per source.
        held_out: Inputs that nothing was fitted to.
    """
    models = [*(target.instance(state) for state in states), *(source.instance() for source in sources)]
    sums: list[_Outputs] = [_Outputs() for _ in models]
    spread = _Spread()
    classes: set[int] = set()
    for inputs in held_out:
        outputs = [outputs_of(model, inputs) for model in models]
        for place in range(len(outputs[0])):
            each = [of_model[place] for of_model in outputs]
            goal = _ensemble(each[2:], model_weights, each[0])
            if goal is None:
                return None
            # Heads of other sizes than the fused one's are no results to compare it with.
            sums = sums if all(of_source.shape == goal.shape for of_source in each[2:]) else sums[:2]
            each = each[: len(sums)]
            spread.add(place, goal)
            for of_model, own in zip(sums, each, strict=True):
                of_model.add(own, goal)
            classes.update(goal.argmax(1).unique().tolist() if goal.ndim == 2 and goal.shape[1] > 2 else (0, 1))
    if not spread.count:
        return None
    distances = [of_model.distance(spread.variation) for of_model in sums]
    return RepairComparison(
        repair=name,
        held_out=spread.count,
        repaired=distances[0],
        unrepaired=distances[1],
        sources=tuple(distances[2:]),
        is_one_sided=len(classes) == 1 and spread.count >= _TELLING,
    )


def _ensemble(outputs: Sequence[Tensor], model_weights: Sequence[float], like: Tensor) -> Tensor | None:
    """Returns what the sources make together, as the fused network makes it.

    It is the mean; where the fused network has the heads of all, their outputs beside each other; where it keeps one
    head, the mean over the sources with as many outputs, None where no source has.
    """
    alike = [(weight, each) for weight, each in zip(model_weights, outputs, strict=True) if each.shape == like.shape]
    if len(alike) == len(outputs):
        return torch.stack([weight * each for weight, each in alike]).sum(0)
    for axis in range(like.ndim):
        others = [[*each.shape[:axis], *each.shape[axis + 1 :]] for each in (like, *outputs)]
        if all(each == others[0] for each in others) and sum(x.shape[axis] for x in outputs) == like.shape[axis]:
            return torch.cat(list(outputs), axis)
    total = sum(weight for weight, _ in alike)
    return torch.stack([weight / total * each for weight, each in alike]).sum(0) if total > 0 else None


class _Spread:
    """How much the ensemble's outputs vary from sample to sample."""

    def __init__(self) -> None:
        self.count = 0
        self.squares: dict[int, float] = {}
        self.totals: dict[int, Tensor] = {}

    def add(self, place: int, goal: Tensor) -> None:
        self.count += len(goal) if place == 0 and goal.ndim else 0
        self.squares[place] = self.squares.get(place, 0.0) + float(goal.square().sum())
        self.totals[place] = self.totals.get(place, 0) + goal.sum(0)

    @property
    def variation(self) -> float:
        """The sum of squares around the mean over the samples, of all outputs; of the outputs where none varies."""
        whole = sum(self.squares.values())
        around = whole - sum(float(total.square().sum()) / self.count for total in self.totals.values())
        return around if around > 1e-9 * whole else whole


def _class_axis(outputs: Tensor) -> int | None:
    """Returns along which axis classes stand: the second of two, or the one along which probabilities sum to one."""
    if outputs.ndim < 2:
        return None
    if outputs.ndim == 2:
        return 1 if outputs.shape[1] > 1 else None
    for axis in (outputs.ndim - 1, 1):
        # A mean of logarithms sums to no more than one.
        total = outputs.exp().sum(axis)
        if outputs.shape[axis] > 1 and bool(outputs.max() <= 1e-6) and bool((total <= 1 + 1e-3).all()):
            return axis
    return None
