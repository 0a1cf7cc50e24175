"""A stream at the places that are read: some may be taken, put in another order, or averaged behind the norm."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from mergeot_repair.programs.running import StagedRun
from mergeot_repair.streams.finding import Point

# What makes equal numbers of these, whichever they are, does nothing to the neurons of a place.
_NUMBERS = (2.0, 3.0)


def rows_read(point: Point, run: StagedRun) -> tuple[Tensor, Tensor]:
    """Returns a stream and what is read of it behind its norm, both with the same places ``[place, neuron]``.

    What only moves places there is done to the stream itself: a class token may be taken behind the norm as well as
    before it.
    """
    path = [run.nodes[name] for name in point.path]
    beside = _beside(path, point.stream)
    values = run.values_of([point.stream, point.source, *beside])
    stream, before = values[point.stream], run.nodes[point.stream]
    for node in path:
        changed = _as_function(node, before, values)
        if _moves_places(changed, stream):
            stream = changed(stream)
        before = node
    # Where what is read has its neurons last, so has now the stream: a transposition moves places too.
    return stream.flatten(0, -2), values[point.source].flatten(0, -2)


def _beside(path: Iterable[fx.Node], stream: str) -> list[str]:
    """Returns what the operations of a path read besides each other."""
    inside = {stream, *(node.name for node in path)}
    read = {before.name for node in path for before in node.all_input_nodes}
    return sorted(read - inside)


def _as_function(node: fx.Node, before: fx.Node, values: Mapping[str, Any]) -> Callable[[Tensor], Tensor]:
    """Returns an operation as a function of one of its inputs."""

    def changed(value: Tensor) -> Tensor:
        def given(read: fx.Node) -> Any:
            return value if read is before else values[read.name]

        return node.target(*map_arg(node.args, given), **map_arg(node.kwargs, given))  # type: ignore[operator]

    return changed


def _moves_places(changed: Callable[[Tensor], Tensor], value: Tensor) -> bool:
    """Whether an operation takes, orders or averages places, or sums them up, and leaves their neurons alone."""
    for number in _NUMBERS:
        made = changed(torch.full_like(value, number))
        if made.numel() == value.numel() and not torch.allclose(made, torch.full_like(made, number), rtol=1e-4):
            return False
    return True
