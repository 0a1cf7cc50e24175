"""What a symmetry of a neuron group is."""

from __future__ import annotations

from collections.abc import Mapping

# (parameter, axis) -> whether the numbers there change sign: one answer, or one per gate where the axis holds gates.
SignPlaces = Mapping[tuple[str, int], tuple[bool, ...]]
