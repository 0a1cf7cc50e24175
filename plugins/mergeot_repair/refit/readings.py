"""Linear maps as the choice of neurons sees them: which neurons they read, and which they make."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_ot import ModelGraph
from mergeot_repair.programs.layouts import stretches
from mergeot_repair.programs.maps import LinearMap
from mergeot_repair.refit.recurrent import Cell, regressions


@dataclass(frozen=True)
class Reading:
    """One regression: a linear layer, a convolution, or the gates of a recurrent cell that are fitted together.

    Attributes:
        name: By which it is found.
        weights: Whose columns it reads, one after the other.
        makes: A weight on which the neurons that it makes stand, and on which of its axes.
        repeats: How often each neuron is made (the gates of a recurrent cell).
        owned: Parameters that it alone may change.
        has_shift: Whether its outputs may be shifted.
        is_recurrent: Whether it is a part of a recurrent cell.
    """

    name: str
    weights: tuple[str, ...]
    makes: tuple[str, int]
    repeats: int = 1
    owned: tuple[str, ...] = ()
    has_shift: bool = True
    is_recurrent: bool = False

    def made(self, graph: ModelGraph) -> list[tuple[str, int]] | None:
        """Returns (group, numbers per neuron) of what it makes; None where something else is made."""
        return stretches(graph, *self.makes)

    def makes_groups(self, graph: ModelGraph) -> set[str]:
        """Returns the groups that it makes."""
        return {group for group, _ in self.made(graph) or ()}

    def reads_groups(self, graph: ModelGraph) -> set[str]:
        """Returns the groups that it reads."""
        groups: set[str] = set()
        for weight in self.weights:
            groups.update(group for group, _ in stretches(graph, weight, 1) or ())
        return groups


def reading_of(linear_map: LinearMap) -> Reading:
    """Returns a linear layer or a convolution as a reading."""
    weight, norm = linear_map.weight, linear_map.norm
    bias = () if linear_map.bias is None else (linear_map.bias,)
    owned = (weight, *bias, *(() if norm is None else norm.names))
    return Reading(weight, (weight,), (weight, 0), owned=owned, has_shift=linear_map.has_shift)


def readings_of_cell(cell: Cell, hidden: int) -> list[Reading]:
    """Returns the regressions of a recurrent cell, in the order of `mergeot_repair.refit.recurrent.regressions`."""
    readings = []
    for number, (rows, reads_input, reads_hidden) in enumerate(regressions(cell, hidden)):
        weights = itertools.compress(cell.names[:2], (reads_input, reads_hidden))
        readings.append(
            Reading(
                f"{cell.names[1]} {number}",
                tuple(weights),
                # The gates stand before the neurons on axis 0; on axis 1 of the hidden weight the neurons stand alone.
                (cell.names[1], 1),
                (rows.stop - rows.start) // hidden,
                cell.names,
                has_shift=len(cell.names) > 2,
                is_recurrent=True,
            )
        )
    return readings


def all_readings(maps: Sequence[LinearMap], cells: Sequence[tuple[Cell, int]]) -> dict[str, Reading]:
    """Returns the readings of all maps and recurrent cells (each with its width) by name."""
    readings = [reading_of(linear_map) for linear_map in maps if linear_map.is_plain]
    for cell, hidden in cells:
        readings += readings_of_cell(cell, hidden)
    return {reading.name: reading for reading in readings}
