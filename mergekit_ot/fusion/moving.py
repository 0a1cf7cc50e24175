"""Tensors follow the couplings: blocks, parameters and values moved to the fused neurons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool
from torch import Tensor

from mergekit_ot.fusion.alignment import Alignment, Pairs
from mergekit_ot.fusion.gathering import gathered
from mergekit_ot.graph.blocks import Block, blocks_of, context_place, gate_dimension, paired_blocks, spread_along
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.layouts import IN, Fixed, layout_size


@dataclass(frozen=True)
class _Part:
    """A dimension while its block is transported: what is left of its context, and the pairs fixed so far."""

    group: str | None
    role: str
    axis: int
    pairs: dict[str, tuple[int, int]]
    answers: tuple[bool, ...] = (False,)


def transport_block(
    block: Block,
    parameter: str,
    alignment: Alignment,
    source: int,
    keep: frozenset[int] = frozenset(),
    fixed: Mapping[int, tuple[int, int]] | None = None,
) -> Tensor:
    """Returns a block of a source's parameter with its dimensions moved to the fused neurons.

    Role OUT is averaged, role IN is split (2.4 of the design): what flows through a split neuron is conserved.

    Args:
        block: A view of the source's tensor.
        parameter: Its name.
        alignment: Must align the group of every dimension that is not kept.
        source: Number of the source.
        keep: Dimensions to leave in the source's own order.
        fixed: Dimension → (fused index, source index) at which it is cut; it is gone from the result.
    """
    if not fixed and _stays(block, alignment, source, keep):
        return block.view
    parts = [
        _Part(
            None if place in keep else d.group,
            alignment.role(source, parameter, d.axis, d.group),
            d.axis,
            {},
            alignment.direction_answers(parameter, d.axis, d.group),
        )
        for place, d in enumerate(block.dimensions)
    ]
    view, places = block.view, list(range(len(parts)))
    for place, pair in (fixed or {}).items():
        for other in _contexts(block, parts, places, alignment).get(place, []):
            pairs = {**parts[other].pairs, block.dimensions[place].group or "": pair}
            parts[other] = replace(parts[other], pairs=pairs)
        view = view.select(places.index(place), pair[1])
        places.remove(place)
    return _transport(block, view, parts, places, alignment, source)


def _stays(block: Block, alignment: Alignment, source: int, keep: frozenset[int]) -> bool:
    """Whether all that moves in a block is coupled neuron by neuron."""
    keys = {d.group for place, d in enumerate(block.dimensions) if d.group is not None and place not in keep}
    return all(alignment.couplings[key][source].is_identity for key in keys if key in alignment.couplings)


def _transport(
    block: Block, view: Tensor, parts: list[_Part], places: list[int], alignment: Alignment, source: int
) -> Tensor:
    """Transports `view`, whose dimensions are those of `block` at `places`; the others are fixed already."""
    contexts = _contexts(block, parts, places, alignment)
    if contexts and not any(any(parts[place].answers) for place in places):
        groups = {place: parts[place].group for place in places}
        cuts = {place: parts[place].pairs for place in places}
        moved = gathered(block, view, groups, cuts, alignment, source)
        if moved is not None:
            return moved
    for position, place in enumerate(places):
        dependents = contexts.get(place)
        if not dependents or place in {p for inner in contexts.values() for p in inner}:
            continue
        return _transport_family(block, view, parts, places, alignment, source, position, dependents)
    for position, place in enumerate(places):
        part = parts[place]
        if part.group is not None and part.group in alignment.couplings:
            coupling = alignment.coupling(part.group, source, _pairs_of(part, alignment))
            is_odd = _changes_sign(block, place, part.answers, view, places)
            view = coupling.move(view, position, part.role == IN, is_odd)
    return view


def _changes_sign(
    block: Block, place: int, answers: tuple[bool, ...], view: Tensor, places: list[int]
) -> bool | Bool[Tensor, ...]:
    """Returns whether the numbers of a view change sign with the neurons at a dimension: all, none, or some gates."""
    if not any(answers):
        return False
    gates = gate_dimension(block, place, answers)
    if gates is None:
        return True
    return spread_along(torch.tensor(answers, device=view.device), places.index(gates), view.ndim)


def _contexts(block: Block, parts: list[_Part], places: list[int], alignment: Alignment) -> dict[int, list[int]]:
    """Returns dimension → the families in this block that are indexed by it and not fixed yet."""
    found: dict[int, list[int]] = {}
    for place in places:
        part = parts[place]
        if part.group is None or part.group not in alignment.couplings:
            continue
        for outer in alignment.target.groups[part.group].context:
            if outer not in part.pairs:
                found.setdefault(context_place(block.dimensions, place, outer), []).append(place)
    return found


def _transport_family(
    block: Block,
    view: Tensor,
    parts: list[_Part],
    places: list[int],
    alignment: Alignment,
    source: int,
    position: int,
    dependents: list[int],
) -> Tensor:
    part = parts[places[position]]
    outer = block.dimensions[places[position]].group or ""
    rest = [place for place in places if place != places[position]]
    result: Tensor | None = None
    if part.group is None:
        # The context stays in the source's order: each family member is that of the pair on the diagonal.
        entries: list[tuple[int, int, float]] = [(k, k, 1.0) for k in range(view.shape[position])]
        size = view.shape[position]
    else:
        coupling = alignment.coupling(outer, source, _pairs_of(part, alignment))
        entries, size = list(coupling.entries(part.role == IN)), coupling.target_size
    for target_index, source_index, weight in entries:
        fixed = list(parts)
        for place in dependents:
            pairs = {**parts[place].pairs, outer: (target_index, source_index)}
            fixed[place] = replace(parts[place], pairs=pairs)
        moved = _transport(block, view.select(position, source_index), fixed, rest, alignment, source)
        if result is None:
            shape = [*moved.shape[:position], size, *moved.shape[position:]]
            result = torch.zeros(shape, dtype=moved.dtype, device=moved.device)
        result.select(position, target_index).add_(moved, alpha=weight)
    return view if result is None else result


def _pairs_of(part: _Part, alignment: Alignment) -> Pairs:
    return tuple(part.pairs[outer] for outer in alignment.target.groups[part.group or ""].context)


def transport_parameter(tensor: Tensor, name: str, alignment: Alignment, source: int) -> Tensor:
    """Returns a source's parameter in the neuron order and sizes of the fused model.

    Whole numbers and masks, which buffers hold, are rounded where neurons are mixed.
    """
    return _apart(moved_parameter(tensor, name, alignment, source), tensor)


def moved_parameter(tensor: Tensor, name: str, alignment: Alignment, source: int) -> Tensor:
    """Returns what `transport_parameter` does, or a view of the source where nothing moves: not to be written to."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        moved = moved_parameter(tensor.double(), name, alignment, source)
        return moved > 0 if tensor.dtype is torch.bool else moved.round().to(tensor.dtype)
    layouts = alignment.moved_layouts(source, name)
    blocks, shape = blocks_of(tensor, alignment.graphs[source].layouts[name]), tuple(map(layout_size, layouts))
    if len(blocks) == 1:
        return transport_block(blocks[0], name, alignment, source).reshape(shape)
    result = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    for old, new in zip(blocks, blocks_of(result, layouts), strict=True):
        new.view.copy_(transport_block(old, name, alignment, source))
    return result


def _apart(moved: Tensor, tensor: Tensor) -> Tensor:
    """Returns values in memory of their own, in order: where nothing moves, a view of the source comes back."""
    is_view = moved.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    return moved.clone(memory_format=torch.contiguous_format) if is_view else moved.contiguous()


class MovedState(Mapping[str, Tensor]):
    """A state of a source in the neuron order and sizes of the fused model; a tensor is moved when it is asked for.

    Args:
        state: What the source holds.
        template: State dict of the fused architecture; it gives what no source has of a fitting shape.
        alignment: The couplings.
        source: Number of the source.
    """

    def __init__(
        self, state: Mapping[str, Tensor], template: Mapping[str, Tensor], alignment: Alignment, source: int
    ) -> None:
        self.state, self.template, self.alignment, self.source = state, template, alignment, source

    def __getitem__(self, name: str) -> Tensor:
        tensor, graph = self.template[name], self.alignment.graphs[self.source]
        described = graph.aliases.get(name, name)
        if described in graph.layouts:
            return transport_parameter(self.state[described].detach(), described, self.alignment, self.source)
        own = self.state.get(name, tensor)
        return (own if own.shape == tensor.shape else tensor).detach().clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.template)

    def __len__(self) -> int:
        return len(self.template)


def moved_state(
    state: Mapping[str, Tensor], template: Mapping[str, Tensor], alignment: Alignment, source: int
) -> dict[str, Tensor]:
    """Returns a state of a source in the neuron order and sizes of the fused model, all of it.

    Args:
        state: What the source holds.
        template: State dict of the fused architecture; it gives what no source has of a fitting shape.
        alignment: The couplings.
        source: Number of the source.
    """
    return dict(MovedState(state, template, alignment, source))


def transport_values(
    values: Tensor, axis: int, parameter: str, parameter_axis: int, alignment: Alignment, source: int
) -> Tensor:
    """Returns values that a source's neurons have, in the order and number of the fused model (averaged: role OUT).

    Args:
        values: One entry per neuron along `axis`.
        axis: Where the neurons are.
        parameter: A parameter that owns these neurons on `parameter_axis`.
        parameter_axis: Which of its axes that is.
        alignment: The couplings.
        source: Number of the source.
    """
    rows = values.movedim(axis, 0)
    # As many empty axes before as in the parameter, so that roles and signs are looked up at its axis.
    before, rest = [Fixed(1)] * parameter_axis, [Fixed(size) for size in rows.shape[1:]]
    mine, fused = (side.layouts[parameter][parameter_axis] for side in (alignment.graphs[source], alignment.target))
    result = torch.empty((layout_size(fused), *rows.shape[1:]), dtype=rows.dtype, device=rows.device)
    for _ in before:
        rows = rows[None]
    view = result[(None,) * parameter_axis]
    for old, new in paired_blocks(rows, [*before, mine, *rest], view, [*before, fused, *rest]):
        new.view.copy_(transport_block(old, parameter, alignment, source))
    return result.movedim(0, axis)


def fused_shape(graph: ModelGraph, name: str) -> tuple[int, ...]:
    """Returns the shape of a parameter in the fused model."""
    return tuple(layout_size(layout) for layout in graph.layouts[name])
