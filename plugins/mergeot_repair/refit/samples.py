"""What a linear map reads and makes as rows of a regression: linear layers and convolutions of all kinds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mergeot_repair.programs.maps import CONVOLUTION, LINEAR, TRANSPOSED, LinearMap


def regression_rows(
    linear_map: LinearMap, weight: Tensor, arguments: Mapping[str, Any], values: Tensor, targets: Tensor
) -> tuple[Float[Tensor, "samples inputs"], Float[Tensor, "samples outputs"]]:
    """Returns what a map reads and what it is to make, a row per sample or place.

    Args:
        linear_map: The map.
        weight: Its weight in the network at hand.
        arguments: Of its operation, by name.
        values: What it reads.
        targets: What it is to make.

    Returns:
        Inputs, of all groups of channels one after the other, and targets.
    """
    every = torch.arange(row_count(linear_map, targets))
    rows = read_rows(linear_map, weight, arguments, values, every, targets.shape)
    return rows, made_rows(linear_map, targets, every)


def row_count(linear_map: LinearMap, made: Tensor) -> int:
    """Returns how many samples or places there are in what a map makes."""
    return made.numel() // made.shape[linear_map.values_axis]


def made_rows(linear_map: LinearMap, made: Tensor, rows: Int[Tensor, " sample"]) -> Float[Tensor, "samples outputs"]:
    """Returns some rows of what a map makes."""
    if linear_map.kind == LINEAR:
        return made.reshape(-1, made.shape[-1])[rows]
    return made.movedim(1, -1)[_places(rows, made.shape)]


def read_rows(
    linear_map: LinearMap,
    weight: Tensor,
    arguments: Mapping[str, Any],
    values: Tensor,
    rows: Int[Tensor, " sample"],
    made: torch.Size,
) -> Float[Tensor, "samples inputs"]:
    """Returns what some rows of what a map makes are made of.

    Args:
        linear_map: The map.
        weight: Its weight in the network at hand.
        arguments: Of its operation, by name.
        values: What it reads.
        rows: The rows.
        made: Shape of what it makes.
    """
    if linear_map.kind == LINEAR:
        return values.reshape(-1, values.shape[-1])[rows]
    return _patches(linear_map, values, weight, arguments, _places(rows, made))


def _places(rows: Int[Tensor, " sample"], made: torch.Size) -> tuple[Int[Tensor, " sample"], ...]:
    """Returns the sample, and the place along each axis, of each row."""
    return torch.unravel_index(rows, (made[0], *made[2:]))


def rows_of(linear_map: LinearMap, weight: Tensor) -> Float[Tensor, "outputs inputs"]:
    """Returns a weight as one row per output, in the order of `regression_rows`."""
    if linear_map.kind == TRANSPOSED:
        weight = weight.transpose(0, 1).flip(*range(2, weight.ndim))
    return weight.T if linear_map.is_turned else weight.flatten(1)


def weight_of(linear_map: LinearMap, rows: Float[Tensor, "outputs inputs"], like: Tensor) -> Tensor:
    """Returns rows as a weight of the shape and type of another; the inverse of `rows_of`."""
    if linear_map.kind == TRANSPOSED:
        inputs, outputs, *kernel = like.shape
        rows = rows.reshape(outputs, inputs, *kernel).transpose(0, 1).flip(*range(2, like.ndim))
    if linear_map.is_turned:
        rows = rows.T
    return rows.reshape(like.shape).to(like.dtype).contiguous()


@dataclass(frozen=True)
class _Geometry:
    """Where a convolution, or the plain one that a transposed one is, reads.

    Attributes:
        kernel: Sizes of the kernel.
        stride: Places between two results.
        dilation: Places between two taps.
        sides: What is added before and behind each axis.
        spread: Places between two values of a transposed convolution's input; ones for a plain convolution.
    """

    kernel: tuple[int, ...]
    stride: list[int]
    dilation: list[int]
    sides: list[tuple[int, int]]
    spread: list[int]

    @classmethod
    def of(cls, linear_map: LinearMap, weight: Tensor, arguments: Mapping[str, Any]) -> _Geometry:
        """Returns that of a map."""
        count, kernel = weight.ndim - 2, tuple(weight.shape[2:])
        stride, dilation = (_each(arguments[name], count) for name in ("stride", "dilation"))
        reach = [dilation[axis] * (kernel[axis] - 1) + 1 for axis in range(count)]
        sides = _padding(arguments["padding"], reach)
        if linear_map.kind != TRANSPOSED:
            return cls(kernel, stride, dilation, sides, [1] * count)
        # A transposed convolution is a plain one of the input with zeros between its places.
        more = _each(arguments["output_padding"], count)
        sides = [
            (reach[axis] - 1 - sides[axis][0], reach[axis] - 1 - sides[axis][1] + more[axis]) for axis in range(count)
        ]
        return cls(kernel, [1] * count, dilation, sides, stride)

    def reads(self, axis: int, places: Int[Tensor, " sample"], before: int) -> Int[Tensor, "samples taps"]:
        """Returns the places along an axis that the taps of each result read, where `before` are added before it."""
        count = len(self.kernel)
        taps = torch.arange(self.kernel[axis]) * self.dilation[axis] - before
        taps = taps.reshape([-1 if other == axis else 1 for other in range(count)])
        return places[:, None] * self.stride[axis] + taps.expand(self.kernel).flatten()


def inside_of(
    linear_map: LinearMap,
    weight: Tensor,
    arguments: Mapping[str, Any],
    values: torch.Size,
    rows: Int[Tensor, " sample"],
    made: torch.Size,
) -> Bool[Tensor, "samples taps"] | None:
    """Returns which taps of some rows of what a convolution makes are inside what it reads; None for other maps.

    Args:
        linear_map: The map.
        weight: Its weight in the network at hand.
        arguments: Of its operation, by name.
        values: Shape of what it reads.
        rows: The rows.
        made: Shape of what it makes.
    """
    if linear_map.kind != CONVOLUTION:
        return None
    geometry = _Geometry.of(linear_map, weight, arguments)
    inside = torch.ones(1, 1, dtype=torch.bool)
    _, *along = _places(rows, made)
    for axis, size in enumerate(values[2:]):
        place = geometry.reads(axis, along[axis], geometry.sides[axis][0])
        inside = inside & (place >= 0) & (place < size)
    return inside


def _patches(
    linear_map: LinearMap,
    values: Tensor,
    weight: Tensor,
    arguments: Mapping[str, Any],
    places: Sequence[Int[Tensor, " sample"]],
) -> Float[Tensor, "samples inputs"]:
    """Returns what some places of a convolution's result read, for one, two or three dimensions."""
    geometry = _Geometry.of(linear_map, weight, arguments)
    count, sides = len(geometry.kernel), geometry.sides
    if linear_map.kind == TRANSPOSED:
        values = _spread(values, geometry.spread)
    sample, *along = places
    by_place = values.movedim(1, -1)
    # Of few places each is read where it stands; many are faster to read where all channels of one stand together, with
    # zeros around.
    if len(sample) * math.prod(geometry.kernel) > values[:, 0].numel():
        around = [size for side in reversed(sides) for size in side]
        by_place, sides = functional.pad(by_place, (0, 0, *around)).contiguous(), [(0, 0)] * count
    index, is_inside = [sample[:, None]], torch.ones(1, 1, dtype=torch.bool)
    for axis, size in enumerate(by_place.shape[1:-1]):
        place = geometry.reads(axis, along[axis], sides[axis][0])
        is_inside = is_inside & (place >= 0) & (place < size)
        index.append(place.clamp(0, size - 1))
    read = by_place[tuple(index)]
    if not bool(is_inside.all()):
        read[~is_inside] = 0
    return read.transpose(1, 2).flatten(1)


def _padding(padding: object, reach: Sequence[int]) -> list[tuple[int, int]]:
    """Returns what is added before and behind each axis of places."""
    if padding == "same":
        return [((size - 1) // 2, size - 1 - (size - 1) // 2) for size in reach]
    if padding == "valid":
        return [(0, 0)] * len(reach)
    return [(size, size) for size in _each(padding, len(reach))]


def _spread(values: Tensor, stride: Sequence[int]) -> Tensor:
    """Returns values with zeros between the places."""
    places = [(size - 1) * step + 1 for size, step in zip(values.shape[2:], stride, strict=True)]
    spread = values.new_zeros(*values.shape[:2], *places)
    spread[(..., *(slice(None, None, step) for step in stride))] = values
    return spread


def _each(value: Any, count: int) -> list[int]:
    numbers = list(value) if isinstance(value, Iterable) else [value]
    return numbers * count if len(numbers) == 1 else numbers
