"""How large a wider network becomes where: hidden layers grow first whose neurons the sources need most of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_ot.errors import RecipeError
from mergekit_ot.fusion.growth.record import Growth
from mergekit_ot.fusion.growth.resizing import take_sizes
from mergekit_ot.fusion.responses import GroupResponses, ResponseGrams
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.fusion.tracing import TracedModels
from mergekit_ot.graph.ir import ModelGraph, NeuronGroup
from mergekit_ot.graph.layouts import AxisLayout, Factors, Fixed, Neurons, layout_size

# A layer grows by this share of its own neurons at a time.
_STEP = 16
# What is left open of responses below this is rounding.
_NOTHING = 1e-6


def wider(models: TracedModels, batches: Sequence[Sequence[Tensor]], factor: float) -> tuple[SourceModel, Growth]:
    """Returns the target with more neurons in its hidden layers, and how many.

    In every hidden layer neurons of all sources are picked one after the other, each the one that tells most of what
    those before leave open of all responses (a QR decomposition with pivots). What is left open after as many as the
    target has says how much a layer would gain; layers grow in the order of gain per parameter.

    Args:
        models: The sources and the target.
        batches: Calibration inputs.
        factor: Parameters of the wider network at most, as a multiple of the target's.

    Raises:
        RecipeError: No hidden layer can grow.
    """
    graph = models.target_graph
    keys = [key for key, group in graph.free_groups.items() if _can_grow(graph, group)]
    if not keys:
        raise RecipeError(
            "No hidden layer of this network can grow (--widen): its neurons stand on residual streams, in heads, or "
            "in layers that repeat. Give an architecture with other widths: --target SPEC."
        )
    seen = ResponseGrams(models.graphs, [dict(source.state) for source in models.sources], keys, len(batches))
    for batch in batches:
        seen.add(batch)
    left = {key: open_after(seen.of([key]), key) for key in keys}
    sizes = _grown(models, left, factor)
    shapes = {name: torch.Size(_shape(graph, name, sizes)) for name in graph.layouts}
    shapes |= {alias: shapes[name] for alias, name in graph.aliases.items() if name in shapes}
    own = models.target.architecture

    def make() -> nn.Module:
        built = own.built()
        take_sizes(built, {name: shape for name, shape in shapes.items() if name in own.shapes})
        return built

    grown = {key: (graph.groups[key].size, size) for key, size in sizes.items() if size > graph.groups[key].size}
    growth = Growth(grown, (_parameters(models, {}), _parameters(models, sizes)))
    return SourceModel(models.target.name, make), growth


def open_after(responses: GroupResponses, key: str) -> Float[Tensor, " picked"]:
    """Returns the share of all neurons' responses that is left open by the best neurons, by how many were picked.

    Args:
        responses: Inner products of the responses of a group's neurons, in all sources.
        key: The group.
    """
    rows = responses.rows(key)
    if rows is None:
        return torch.zeros(1, dtype=torch.float64)
    # What heavy linear algebra brings takes time to import.
    from scipy.linalg import qr

    values = torch.cat(rows).double()
    (triangle,) = qr(values.T.numpy(), mode="r", pivoting=True)[:1]
    told = torch.from_numpy(triangle).square().sum(1)
    left = told.flip(0).cumsum(0).flip(0)
    share = torch.cat([left, left.new_zeros(1)]) / left[0].clamp_min(1e-300)
    return share.where(share > _NOTHING, 0.0)


def _grown(models: TracedModels, left: Mapping[str, Tensor], factor: float) -> dict[str, int]:
    """Returns group → neurons: grown step by step where most is gained per parameter, as far as the factor allows."""
    graph = models.target_graph
    sizes = {key: graph.groups[key].size for key in left}
    steps = {key: max(1, size // _STEP) for key, size in sizes.items()}
    most = factor * _parameters(models, {})
    count = _parameters(models, {})
    while True:
        gains: list[tuple[float, str, int, int]] = []
        for key, size in sizes.items():
            wide = min(size + steps[key], len(left[key]) - 1)
            if wide > size:
                parameters = _parameters(models, {**sizes, key: wide})
                gain = float(left[key][size] - left[key][wide]) / (parameters - count)
                gains += [(gain, key, wide, parameters)] if parameters <= most and gain > 0 else []
        if not gains:
            return sizes
        _, best, sizes[best], count = max(gains)


def _parameters(models: TracedModels, sizes: Mapping[str, int]) -> int:
    """Returns how many parameters the target has where groups have other sizes."""
    graph, shapes = models.target_graph, models.target.architecture.shapes
    described = [name for name in graph.layouts if name not in graph.buffers and name in shapes]
    return sum(math.prod(_shape(graph, name, sizes)) for name in described)


def _shape(graph: ModelGraph, name: str, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(_size(layout, sizes) for layout in graph.layouts[name])


def _size(layout: AxisLayout, sizes: Mapping[str, int]) -> int:
    if isinstance(layout, Neurons):
        return sizes.get(layout.group, layout.size)
    if isinstance(layout, Factors):
        return math.prod(_size(part, sizes) for part in layout.parts)
    return layout_size(layout)


def _can_grow(graph: ModelGraph, group: NeuronGroup) -> bool:
    """Whether a group is a hidden layer: made by one weight, read by others, alone on each axis where it stands."""
    makers = {slot.parameter for slot in group.members if not slot.is_reader and len(graph.layouts[slot.parameter]) > 1}
    readers = {slot.parameter for slot in group.members if slot.is_reader}
    places = [graph.layouts[slot.parameter][slot.axis] for slot in group.members]
    is_plain = not group.context and not group.flags and all(map(_is_plain, places))
    return is_plain and len(makers) == 1 and bool(readers) and not makers & readers


def _is_plain(layout: AxisLayout) -> bool:
    """Whether nothing stands on an axis but one group, each neuron of it once or on a stretch."""
    parts = layout.parts if isinstance(layout, Factors) else (layout,)
    neurons = [part for part in parts if isinstance(part, Neurons)]
    return len(neurons) == 1 and all(isinstance(part, Neurons | Fixed) for part in parts)
