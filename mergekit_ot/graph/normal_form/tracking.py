"""Follows neurons through movements of a program: each number of a value is replaced by the neuron that it is."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx
from torch.fx.node import map_arg

from mergekit_ot.graph.capture.program import named_arguments, operation_name, shape_of

# What leaves every number where it is; a change of the number type is none of the function in exact arithmetic.
IDENTITIES = frozenset(
    (
        *("aten.clone", "aten.contiguous", "aten.alias", "aten.detach", "aten.lift_fresh_copy"),
        *("aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten._to_copy", "aten.to", "aten.type_as"),
    )
)
# What only changes the shape; the last axis may stay whole in it.
VIEWS = frozenset(("aten.view", "aten._unsafe_view", "aten.reshape"))
# What copies numbers to other places.
_MOVEMENTS = VIEWS | frozenset(
    (
        *("aten.flatten", "aten.unflatten", "aten.unsqueeze", "aten.squeeze", "aten.transpose", "aten.permute"),
        *("aten.t", "aten.movedim", "aten.swapaxes", "aten.numpy_T", "aten.mT", "aten.expand", "aten.repeat"),
        *("aten.repeat_interleave", "aten.slice", "aten.select", "aten.narrow", "aten.split", "aten.split_with_sizes"),
        *("aten.chunk", "aten.unbind", "aten.roll"),
    )
)
_POOLS = frozenset(f"aten.adaptive_avg_pool{rank}d" for rank in (1, 2, 3))
# Checks that compute nothing.
_CHECKS = frozenset(("aten._assert_tensor_metadata", "aten.sym_size", "aten._assert_async"))

# Node → for each of its numbers, the neuron that it is (shape of the node); of an operation with several results, each.
Tracked = Mapping[fx.Node, Any]


def moved(node: fx.Node, tracked: Tracked) -> Any:
    """Returns the neurons in the result of a movement or of a mean over other axes; None for any other operation."""
    result = _moved(node, tracked)
    # Numbers picked by a mask, say, are as many as the mask holds.
    return None if isinstance(result, Tensor) and tuple(result.shape) != shape_of(node.meta.get("val")) else result


def _moved(node: fx.Node, tracked: Tracked) -> Any:
    operation = operation_name(node)
    if node.target is operator.getitem:
        source = tracked.get(node.args[0])  # type: ignore[arg-type]
        return None if source is None else source[node.args[1]]
    if operation in IDENTITIES:
        return tracked.get(node.args[0])  # type: ignore[arg-type]
    if operation in _MOVEMENTS:
        return _executed(node, tracked)
    if operation == "aten.mean":
        return _mean(node, tracked)
    if operation == "aten.index":
        return _indexed(node, tracked)
    if operation in _POOLS:
        return _pooled(node, tracked)
    return None


def is_movement(node: fx.Node) -> bool:
    """Whether a node copies or leaves the numbers of its first argument, whatever they are."""
    operation = operation_name(node)
    return node.target is operator.getitem or operation in IDENTITIES or operation in _MOVEMENTS


def is_scaling(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node multiplies a value by a number that is no part of the model."""
    if operation_name(node) not in ("aten.mul", "aten.div") or node.args[0] is not source:
        return False
    return isinstance(node.args[1], int | float)


def is_check(node: fx.Node) -> bool:
    """Whether a node computes nothing."""
    return operation_name(node) in _CHECKS


def _executed(node: fx.Node, tracked: Tracked) -> Any:
    others = [used for used in node.all_input_nodes if used not in tracked]
    if others or node.args[0] not in tracked:
        return None
    if operation_name(node) in VIEWS:
        # A copy before it, which made the view possible, is not made here.
        return tracked[node.args[0]].reshape(shape_of(node.meta["val"]))  # type: ignore[index]
    args, kwargs = map_arg((node.args, node.kwargs), lambda used: tracked[used])
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _pooled(node: fx.Node, tracked: Tracked) -> Tensor | None:
    """Returns the neurons of a mean over windows of the last axes, along which they are alike."""
    source, shape = tracked.get(node.args[0]), shape_of(node.meta.get("val"))  # type: ignore[arg-type]
    axes = range(-int(operation_name(node)[-2]), 0)
    if source is None or shape is None or not all(_is_constant(source, axis) for axis in axes):
        return None
    return source.amax(list(axes), keepdim=True).expand(shape)


def _mean(node: fx.Node, tracked: Tracked) -> Tensor | None:
    """Returns the neurons of a mean over axes along which they are alike."""
    arguments = named_arguments(node)
    source, axes = tracked.get(arguments["self"]), arguments.get("dim")
    if source is None or not axes or any(not _is_constant(source, axis) for axis in axes):
        return None
    return source.amax(list(axes), keepdim=bool(arguments.get("keepdim", False)))


def _indexed(node: fx.Node, tracked: Tracked) -> Tensor | None:
    """Returns the neurons of rows picked by number, whichever they are, along axes along which neurons are alike."""
    arguments = named_arguments(node)
    source, indices = tracked.get(arguments["self"]), arguments["indices"]
    if source is None or any(index in tracked for index in indices if index is not None):
        return None
    if any(index is not None and not _is_constant(source, axis) for axis, index in enumerate(indices)):
        return None
    shapes = [None if index is None else shape_of(index.meta["val"]) for index in indices]
    zeros = tuple(slice(None) if shape is None else torch.zeros(shape, dtype=torch.long) for shape in shapes)
    return source[zeros]


def _is_constant(neurons: Tensor, axis: int) -> bool:
    return neurons.stride(axis) == 0 or bool((neurons == neurons.narrow(axis, 0, 1)).all())


def neurons_in(neurons: Float[Tensor, ...]) -> set[int]:
    """Returns the neurons that stand in a value.

    Example:
        >>> sorted(neurons_in(numbered((2, 3), 1, start=4)))
        [4, 5, 6]
    """
    return {int(neuron) for neuron in _without_copies(neurons, range(neurons.ndim)).unique()}


def _without_copies(neurons: Tensor, axes: Iterable[int]) -> Tensor:
    """Returns the first place along those of these axes on which memory holds one number for all."""
    for axis in axes:
        if neurons.stride(axis) == 0 and neurons.shape[axis]:
            neurons = neurons.narrow(axis, 0, 1)
    return neurons


def stripped(value: object) -> object:
    """Returns what stands before copies and casts of a value."""
    while isinstance(value, fx.Node) and operation_name(value) in IDENTITIES:
        value = value.args[0]
    return value


def numbered(shape: tuple[int, ...], axis: int, start: int = 0) -> Float[Tensor, ...]:
    """Returns for each number of a value its place on an axis, without taking memory for it.

    Example:
        >>> numbered((2, 3), 1).tolist()
        [[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]
    """
    view = [1] * len(shape)
    view[axis] = -1
    return torch.arange(start, start + shape[axis], dtype=torch.float64).reshape(view).expand(shape)


def along(neurons: Float[Tensor, ...], axis: int) -> Float[Tensor, " n"] | None:
    """Returns the neurons along an axis where they are the same at every other place; None where they are not.

    Example:
        >>> along(numbered((2, 3), 1), 1).tolist(), along(numbered((2, 3), 0), 1)
        ([0.0, 1.0, 2.0], None)
    """
    if not neurons.numel():
        return None
    rows = neurons.movedim(axis, -1)
    rows = _without_copies(rows, range(rows.ndim - 1))
    first = rows[(0,) * (rows.ndim - 1)]
    return first if bool((rows == first).all()) else None


def is_whole(neurons: Float[Tensor, ...], axis: int, size: int) -> bool:
    """Whether all neurons stand in order along an axis, at every other place alike."""
    line = along(neurons, axis)
    return line is not None and len(line) == size and bool((line == torch.arange(size)).all())
