"""How much of a network an alignment reaches: groups aligned, weights pinned, and why."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from mergekit_ot.errors import ResultError
from mergekit_ot.fusion.moving import fused_shape
from mergekit_ot.graph.axes.reasons import PinReason
from mergekit_ot.graph.ir import ModelGraph, NeuronGroup
from mergekit_ot.graph.layouts import OUT, leaf_groups

# What these reasons pin never was an order to choose: there the place itself means something.
_BY_NATURE = (
    "model input",
    "model output",
    "position",
    "offset inside",
    "gate",
    "rows are picked",
    "steps of",
    "initial states",
    "packed by",
    "experts are chosen",
    "chosen experts",
    "tokens are gathered",
)
_TOLD = 2


@dataclass(frozen=True)
class Extent:
    """How much of a network was aligned.

    Attributes:
        aligned: Neuron groups that the solver coupled.
        groups: Neuron groups in all, those that are pinned included: a pinned set of neurons counts where a weight
            matrix makes it and its places mean nothing by themselves, as those of inputs, outputs, pixels and gates do.
        pinned_percent: Weights of which no axis holds a free group, though one of them could, in percent of all.
        reasons: Why, those that pin the most weights first.

    Example:
        >>> import torch
        >>> from mergekit_ot import fuse
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> fuse([net, net], example_inputs=torch.randn(2, 4)).extent.sentence
        '1 of 1 neuron groups aligned, no weight pinned.'
    """

    aligned: int
    groups: int
    pinned_percent: float
    reasons: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """The line that says how much."""
        head = f"{self.aligned} of {self.groups} neuron groups aligned, {self._pinned}"
        return f"{head}, because {self.because}." if self.reasons else f"{head}."

    @property
    def because(self) -> str:
        """The few reasons that pin the most weights, in words."""
        more = len(self.reasons) - _TOLD
        told = list(self.reasons[:_TOLD]) + ([f"{more} more"] if more > 0 else [])
        return " and ".join([", ".join(told[:-1]), told[-1]] if len(told) > 1 else told)

    @property
    def _pinned(self) -> str:
        if self.pinned_percent == 0:
            return "no weight pinned"
        if self.pinned_percent < 0.1:
            return "less than 0.1 % of the weights pinned"
        return f"{self.pinned_percent:.{0 if self.pinned_percent >= 1 else 1}f} % of the weights pinned"


def extent_of(graph: ModelGraph, coupled: Collection[str], free: Collection[str]) -> Extent:
    """Returns how much of a network is aligned.

    Args:
        graph: Its graph.
        coupled: The groups that a solver coupled.
        free: The groups of which something may be chosen: an order, or a rotation.
    """
    weights = {name: math.prod(fused_shape(graph, name)) for name in graph.layouts if name not in graph.buffers}
    # What is pinned and rotates all the same is no loss.
    fixed = [group for key, group in graph.pinned_groups.items() if key not in free and group.size > 1]
    pinned = [group for group in fixed if _is_a_loss(group)]
    standing: dict[str, list[NeuronGroup]] = {}
    for group in pinned:
        for slot in group.members:
            standing.setdefault(slot.parameter, []).append(group)
    lost: dict[str, int] = {}
    first: dict[str, PinReason] = {}
    for name in weights:
        is_free = any(key in free for layout in graph.layouts[name] for key in leaf_groups(layout))
        for group in standing.get(name, [])[:1]:
            reason = group.pin or PinReason("")
            # What an operation without a rule takes in and what it gives is one loss.
            key = reason.operation or reason.why
            first.setdefault(key, reason)
            lost[key] = lost.get(key, 0) + (0 if is_free else weights[name])
    made = [group for group in pinned if any(_is_made_by_a_matrix(graph, group))]
    total = sum(weights.values())
    return Extent(
        aligned=len(coupled),
        groups=len(free) + len(made),
        pinned_percent=100 * sum(lost.values()) / total if total else 0.0,
        reasons=tuple(str(first[key]) for key in sorted(lost, key=lambda key: -lost[key])),
    )


def _is_a_loss(group: NeuronGroup) -> bool:
    return group.pin is not None and not group.pin.why.startswith(_BY_NATURE)


def _is_made_by_a_matrix(graph: ModelGraph, group: NeuronGroup) -> list[bool]:
    return [slot.role == OUT and len(graph.layouts[slot.parameter]) > 1 for slot in group.members]


def check_something_is_free(graph: ModelGraph, free: Collection[str], name: str) -> None:
    """Checks that there are neurons to align, and weights that go with them.

    Raises:
        ResultError: No group is free, or only groups that no weight belongs to.
    """
    # A single neuron needs no partner to be chosen.
    single = [key for key, group in graph.groups.items() if group.pin is None and group.size == 1]
    held = [slot.parameter for key in (*free, *single) for slot in graph.groups[key].members]
    if any(parameter not in graph.buffers for parameter in held):
        return
    extent = extent_of(graph, (), free)
    what = "no weight belongs to a free neuron group" if free else "no neuron group is free"
    why = f", because {extent.because}" if extent.reasons else ": all its axes are inputs, outputs or positions"
    raise ResultError(
        f"Nothing can be aligned in '{name}': {what}{why}. A fusion would be the plain average of networks whose "
        "neurons do not correspond, so nothing was written. 'mergeot inspect' shows every pinned axis; an operation "
        "without a rule can be taught one. To average all the same, say so: --solver average."
    )
