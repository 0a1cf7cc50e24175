"""Rules of operations that move, cut or join axes and compute nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mergekit_ot import Atom, FunctionRule, Labels, NodeRule, OperationView, RuleError, Value


def _reshape(operation: OperationView) -> list[Labels]:
    """Matches the smallest runs of axes of equal product; a run is multiplied and divided again."""
    algebra = operation.algebra
    labels, shape, target = operation.labels("self"), operation.shape("self"), operation.output_shapes[0]
    for label in labels:
        algebra.touch(label)
    reshaped: Labels = []
    start = position = 0
    while start < len(shape) or position < len(target):
        end, stop = min(start + 1, len(shape)), min(position + 1, len(target))
        while math.prod(shape[start:end]) != math.prod(target[position:stop]):
            if math.prod(shape[start:end]) < math.prod(target[position:stop]) and end < len(shape):
                end += 1
            elif stop < len(target):
                stop += 1
            else:
                end += 1
        factors = algebra.split_product(algebra.product(labels[start:end]), target[position:stop])
        if factors is None:
            for label in labels[start:end]:
                algebra.pin(label, f"a reshape from {list(shape)} to {list(target)} cuts across its blocks")
            factors = [algebra.pinned(size, "reshaped across blocks") for size in target[position:stop]]
        reshaped += factors
        start, position = end, stop
    return [reshaped]


def _permute(order: Callable[[OperationView], list[int]]) -> Callable[[OperationView], list[Labels]]:
    def rule(operation: OperationView) -> list[Labels]:
        labels = operation.labels("self")
        axes = order(operation)
        operation.carried = list(axes)
        return [[labels[axis] for axis in axes]]

    return rule


def _transposed(operation: OperationView) -> list[int]:
    rank = len(operation.shape("self"))
    axes = list(range(rank))
    first, second = operation.argument("dim0", 0) % rank, operation.argument("dim1", 1) % rank
    axes[first], axes[second] = axes[second], axes[first]
    return axes


def _swapped(operation: OperationView) -> list[int]:
    return list(range(len(operation.shape("self"))))[::-1]


def _moved(operation: OperationView) -> list[int]:
    source, destination = operation.axes("self", "source"), operation.axes("self", "destination")
    rest = [axis for axis in range(len(operation.shape("self"))) if axis not in source]
    for place, axis in sorted(zip(destination, source, strict=True)):
        rest.insert(place, axis)
    return rest


def _join(operation: OperationView) -> list[Labels]:
    values = [value for value in operation.argument("tensors") if math.prod(value.shape) or len(value.shape) > 1]
    axis = operation.argument("dim", 0) % len(values[0].shape)
    return [operation.algebra.concat([value.labels for value in values], axis)]


def _stack(operation: OperationView) -> list[Labels]:
    values = operation.argument("tensors")
    axis = operation.argument("dim", 0) % (len(values[0].shape) + 1)
    unit = operation.algebra.replicated(1)
    tensors = [[*value.labels[:axis], unit, *value.labels[axis:]] for value in values]
    return [operation.algebra.concat(tensors, axis)]


def _cut(operation: OperationView, axis: int, sizes: list[int]) -> list[Labels]:
    """Returns the labels of consecutive blocks; empty ones get none of the neurons."""
    algebra = operation.algebra
    labels = operation.labels("self")
    blocks = algebra.cut(labels, axis, sizes)
    if blocks is None:
        algebra.pin(labels[axis], "cut where its blocks do not allow it")
        blocks = [_with(labels, axis, algebra.pinned(size, "cut across blocks")) for size in sizes if size]
    rest = iter(blocks)
    empty = _with(labels, axis, algebra.pinned(0, "empty"))
    return [next(rest) if size else list(empty) for size in sizes]


def _with(labels: Labels, axis: int, *instead: Any) -> Labels:
    """Returns labels with others in the place of one of them, or none."""
    return [*labels[:axis], *instead, *labels[axis + 1 :]]


def _split(operation: OperationView) -> list[Labels]:
    axis = operation.axes("self", "dim", [0])[0]
    return _cut(operation, axis, [shape[axis] for shape in operation.output_shapes])


def _slice(operation: OperationView) -> list[Labels]:
    axis = operation.axes("self", "dim", [0])[0]
    size, kept = operation.shape("self")[axis], operation.output_shapes[0][axis]
    step = operation.argument("step", 1)
    if step != 1:
        return _pick(operation, axis, [operation.algebra.pinned(kept, "every n-th entry")])
    if kept == 0:
        labels = operation.labels("self")
        for label in labels:
            operation.algebra.touch(label)
        return [_with(labels, axis, operation.algebra.pinned(0, "empty"))]
    start = operation.argument("start", 0)
    start = min(max(start + size if start < 0 else start, 0), size)
    return [_cut(operation, axis, [start, kept, size - start - kept])[1]]


def _pick(operation: OperationView, axis: int, instead: Labels) -> list[Labels]:
    """Entries of `axis` are picked by place: it is pinned, and `instead` stands for it."""
    labels = operation.labels("self")
    operation.algebra.pin(labels[axis], "entries are picked by their place")
    return [_with(labels, axis, *instead)]


def _select(operation: OperationView) -> list[Labels]:
    axis = operation.axes("self", "dim", [0])[0]
    size = operation.shape("self")[axis]
    index = operation.argument("index", 0) % size
    chosen = _cut(operation, axis, [index, 1, size - index - 1])[1]
    return [_with(chosen, axis)]


def _unbind(operation: OperationView) -> list[Labels]:
    axis = operation.axes("self", "dim", [0])[0]
    blocks = _cut(operation, axis, [1] * operation.shape("self")[axis])
    return [_with(block, axis) for block in blocks]


def _expand(operation: OperationView) -> list[Labels]:
    other = operation.argument("other")
    if isinstance(other, Value):
        for label in other.labels:
            operation.algebra.touch(label)  # expand_as looks at a shape only
    return [_copied(operation, lambda _label, _have, want: operation.algebra.replicated(want))]


def _copied(operation: OperationView, copies: Callable[[Any, int, int], Any]) -> Labels:
    """Returns the labels of a tensor that is repeated along axes, new ones before it included.

    Args:
        operation: Whose result has those sizes.
        copies: Gives the label of an axis whose size changes, for what it was, and both sizes.
    """
    algebra = operation.algebra
    labels, shape, target = operation.labels("self"), operation.shape("self"), operation.output_shapes[0]
    new = len(target) - len(shape)
    expanded: Labels = [algebra.replicated(size) for size in target[:new]]
    for label, have, want in zip(labels, shape, target[new:], strict=True):
        algebra.touch(label)
        expanded.append(label if have == want else copies(label, have, want))
    return expanded


def _pad(operation: OperationView) -> list[Labels]:
    """Constant padding adds blocks along which the tensor is constant; any other kind pins the padded axes."""
    algebra = operation.algebra
    labels, pad = operation.labels("self"), list(operation.argument("pad"))
    constant = operation.argument("mode", "constant") == "constant"
    for step in range(len(pad) // 2):
        axis, before, after = len(labels) - 1 - step, pad[2 * step], pad[2 * step + 1]
        if before == after == 0:
            continue
        size = operation.shape("self")[axis]
        if before < 0 or after < 0 or not constant or _is_pinned(labels[axis]):
            algebra.pin(labels[axis], "padded")
            labels[axis] = algebra.pinned(size + before + after, "padded")
            continue
        paddings = [_with(labels, axis, algebra.replicated(count)) for count in (before, after)]
        blocks = [paddings[0]] * (before > 0) + [labels] + [paddings[1]] * (after > 0)
        labels = algebra.concat(blocks, axis)
    return [labels]


def _is_pinned(label: object) -> bool:
    return isinstance(label, Atom) and label.pin is not None


def _repeat_interleave(operation: OperationView) -> list[Labels]:
    axis, repeats = operation.argument("dim"), operation.argument("repeats")
    if axis is None or not isinstance(repeats, int):
        raise RuleError("repeat_interleave without a fixed count along an axis")
    labels = operation.labels("self")
    axis %= len(labels)
    labels[axis] = operation.algebra.product([labels[axis], operation.algebra.replicated(repeats)])
    return [labels]


def _repeat(operation: OperationView) -> list[Labels]:
    """Repeats a tensor as a whole: an axis becomes ``copies × axis``."""
    algebra = operation.algebra
    return [_copied(operation, lambda label, have, want: algebra.product([algebra.replicated(want // have), label]))]


def _swapped_axes(operation: OperationView) -> list[int]:
    rank = len(operation.shape("self"))
    axes = list(range(rank))
    names = ("axis0", "axis1") if "axis0" in operation.arguments else ("dim0", "dim1")
    first, second = (operation.argument(name, 0) % rank for name in names)
    axes[first], axes[second] = axes[second], axes[first]
    return axes


def _matrix_swapped(operation: OperationView) -> list[int]:
    *batch, rows, columns = range(len(operation.shape("self")))
    return [*batch, columns, rows]


def _movement(function: Callable[[OperationView], list[Labels]]) -> NodeRule:
    return FunctionRule(function, is_movement=True)


_SPLITS = [
    "split",
    "split_with_sizes",
    "chunk",
    "tensor_split",
    "unsafe_split",
    "unsafe_split_with_sizes",
    "unsafe_chunk",
]

MOVEMENTS: dict[str, NodeRule] = {
    **{
        f"aten.{name}": _movement(_reshape)
        for name in (
            *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as"),
            *("ravel", "reshape_as", "_reshape_alias", "atleast_1d", "atleast_2d", "atleast_3d"),
        )
    },
    "aten.permute": _movement(_permute(lambda operation: operation.axes("self", "dims"))),
    "aten.transpose": _movement(_permute(_transposed)),
    "aten.t": _movement(_permute(_swapped)),
    "aten.numpy_T": _movement(_permute(_swapped)),
    **{f"aten.{name}": _movement(_permute(_moved)) for name in ("movedim", "moveaxis")},
    **{f"aten.{name}": _movement(_permute(_swapped_axes)) for name in ("swapaxes", "swapdims")},
    **{f"aten.{name}": _movement(_permute(_matrix_swapped)) for name in ("mT", "mH", "adjoint", "matrix_H")},
    **{f"aten.{name}": _movement(_join) for name in ("cat", "concat", "concatenate")},
    "aten.stack": _movement(_stack),
    **{f"aten.{name}": _movement(_split) for name in _SPLITS},
    "aten.slice": _movement(_slice),
    "aten.narrow": _movement(_slice),
    "aten.select": _movement(_select),
    "aten.unbind": _movement(_unbind),
    "aten.expand": _movement(_expand),
    "aten.repeat": _movement(_repeat),
    "aten.tile": _movement(_repeat),
    "aten.broadcast_to": _movement(_expand),
    "aten.expand_as": _movement(_expand),
    "aten.pad": _movement(_pad),
    "aten.constant_pad_nd": _movement(_pad),
    "aten.repeat_interleave": _movement(_repeat_interleave),
}
