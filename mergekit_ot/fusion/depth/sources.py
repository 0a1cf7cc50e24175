"""The sources of a fusion in one depth: that of the deepest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.nn.parameter import is_lazy

from mergekit_ot.errors import RecipeError
from mergekit_ot.fusion.depth.deepening import Deepening, deepened, shapes_of
from mergekit_ot.fusion.depth.series import Shapes, depth_difference
from mergekit_ot.fusion.source import SourceModel


def deepest(networks: Sequence[Mapping[str, torch.Tensor]]) -> int | None:
    """Returns the place of the network that the others become as deep as; None where all are of one depth already.

    Networks that differ by anything but the number of their blocks are told about where their graphs are compared.

    Args:
        networks: Of each, name → tensor of its state dict, on any device.

    Example:
        >>> shapes = {f"blocks.{place}.weight": torch.empty(3, 3) for place in range(3)}
        >>> del (fewer := dict(shapes))["blocks.1.weight"]
        >>> deepest([fewer, shapes, shapes]), deepest([shapes, shapes])
        (1, None)
    """
    names = [frozenset(network) for network in networks]
    if len(set(names)) < 2 or any(is_lazy(tensor) for network in networks for tensor in network.values()):
        return None
    shapes = [_shapes(network) for network in networks]
    place = max(range(len(names)), key=lambda number: len(names[number]))
    others = [number for number in range(len(names)) if names[number] != names[place]]
    return place if all(_has_deeper(shapes[number], shapes) for number in others) else None


def _has_deeper(own: Shapes, others: Sequence[Shapes]) -> bool:
    return any(depth_difference(own, other) is not None for other in others)


def _shapes(network: Mapping[str, torch.Tensor]) -> Shapes:
    return {name: tensor.shape for name, tensor in network.items()}


def target_of_depth(sources: Sequence[SourceModel], target: int | SourceModel) -> int | SourceModel:
    """Returns whose sizes the fused network takes: of sources of different depth, one of the deepest.

    Args:
        sources: In the user's order.
        target: Whose sizes were asked for.

    Raises:
        RecipeError: An architecture was asked for that has fewer blocks than a source.
    """
    networks = [source.architecture.shapes for source in sources]
    if isinstance(target, SourceModel):
        place = deepest([target.architecture.shapes, *networks])
        if place:
            raise RecipeError(
                f"'{target.name}' has fewer blocks than '{sources[place - 1].name}'. The fused network is as deep as "
                "the deepest source: blocks are added to a network without changing it, and never taken out. Name an "
                f"architecture of that depth, or the source: --target {place - 1}."
            )
        return target
    return place_of_depth(networks, target)


def place_of_depth(networks: Sequence[Mapping[str, torch.Tensor]], target: int) -> int:
    """Returns the place of the network whose sizes the fused one takes: a deepest one, where `target` is none.

    Args:
        networks: Of each source, name → tensor of its state dict, on any device.
        target: The place that was asked for.
    """
    place = deepest(networks)
    if place is None or not 0 <= target < len(networks) or networks[target].keys() == networks[place].keys():
        return target
    return place


def is_of_depths(sources: Sequence[SourceModel], goal: SourceModel) -> bool:
    """Returns whether a source has fewer blocks than the network whose sizes are taken."""
    wanted = goal.architecture.shapes
    if all(source.architecture.shapes.keys() == wanted.keys() for source in sources):
        return False
    return deepest([wanted, *(source.architecture.shapes for source in sources)]) is not None


def in_one_depth(
    sources: tuple[SourceModel, ...],
    goal: SourceModel,
    inputs: tuple[object, ...],
    batches: Sequence[tuple[object, ...]],
) -> tuple[tuple[SourceModel, ...], tuple[Deepening, ...]]:
    """Returns the sources with as many blocks as the goal has, and what was done to those that had fewer.

    Args:
        sources: In the user's order.
        goal: Whose sizes the fused network takes.
        inputs: To compare functions with.
        batches: Calibration inputs, to compare blocks with.

    Raises:
        GraphMismatchError: A source cannot be deepened.
    """
    if not is_of_depths(sources, goal):
        return sources, ()
    wanted = goal.architecture.shapes
    # Of one depth and width with the goal; one that has weights tells which blocks are alike.
    likes = [source for source in sources if source.architecture.shapes.keys() == wanted.keys()]
    found = [_deepened(source, [*likes, goal], inputs, batches) for source in sources]
    models = tuple(source if one is None else one.model for source, one in zip(sources, found, strict=True))
    return models, tuple(one for one in found if one is not None)


def depth_notes(deepened: Sequence[Deepening], goal: SourceModel) -> tuple[str, ...]:
    """Returns sentences on sources that were deepened, and on the depth that was chosen.

    Args:
        deepened: What was done to them.
        goal: Whose sizes the fused network takes.
    """
    if not deepened:
        return ()
    chosen = (
        f"Sources differ in depth: the fused network is as deep as the deepest, and has the sizes of '{goal.name}'."
    )
    return (chosen, *(deepening.sentence for deepening in deepened))


def _deepened(
    source: SourceModel,
    likes: Sequence[SourceModel],
    inputs: tuple[object, ...],
    batches: Sequence[tuple[object, ...]],
) -> Deepening | None:
    """Returns a source as deep as one of others that it can become; None where it is as deep already."""
    own = shapes_of(source)
    for like in likes:
        found = depth_difference(own, shapes_of(like))
        if found is not None:
            return deepened(source, like, found, inputs, batches)
    return None
