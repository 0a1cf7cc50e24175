"""Rules of operations that pick, place, sort or scan entries along an axis: that axis keeps its order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mergekit_ot import FunctionRule, Labels, NodeRule, OperationView, Replicated, RuleError, Value

_SCAN = "computed in order along this axis"


def _pin(operation: OperationView, labels: Labels, why: str) -> None:
    for label in labels:
        operation.algebra.pin(label, why)


def _ordered(why: str, argument: str = "dim", name: str = "self") -> NodeRule:
    """The axes given by `argument` stay in order, the others pass to every output."""

    def rule(operation: OperationView) -> list[Labels]:
        labels = operation.labels(name)
        axes = operation.axes(name, argument)
        if not axes:
            axes = list(range(len(labels)))
        _pin(operation, [labels[axis] for axis in axes], why)
        outputs = []
        for shape in operation.output_shapes:
            if len(shape) != len(labels):
                raise RuleError("an axis is removed or added")
            outputs.append(
                [operation.algebra.pinned(shape[i], why) if i in axes else label for i, label in enumerate(labels)]
            )
        return outputs

    return FunctionRule(rule)


def _index(operation: OperationView) -> list[Labels]:
    """``tensor[indices]``: the indexed axes stay in order; axes in which the indices agree pass."""
    labels, indices = operation.labels("self"), list(operation.argument("indices"))
    indices += [None] * (len(labels) - len(indices))
    block = _block(operation, indices)
    if block is not None:
        return [block]
    places = [axis for axis, index in enumerate(indices) if index is not None]
    given = [indices[axis] for axis in places]
    rank = max(len(index.labels) for index in given)
    shape = operation.output_shapes[0]
    if len(shape) != len(labels) - len(places) + rank:
        raise RuleError("a mask picks entries")
    _pin(operation, [labels[axis] for axis in places], "entries are picked by their place")
    first = places[0] if places == list(range(places[0], places[-1] + 1)) else 0
    picked = _agreeing(operation, given, shape[first : first + rank])
    rest = [label for axis, label in enumerate(labels) if axis not in places]
    # A family must see what indexes it on one axis of the result, or it is tied.
    operation.loop([*rest[:first], *picked, *rest[first:]])
    return [[*rest[:first], *_varying(operation, picked), *rest[first:]]]


def _varying(operation: OperationView, labels: Labels) -> Labels:
    """Returns labels of axes along which entries are picked: what was constant along one may vary now."""
    algebra = operation.algebra
    varying = list(labels)
    for place, label in enumerate(labels):
        if _is_constant(label) and algebra.size(label) > 1:
            varying[place] = algebra.pinned(algebra.size(label), "picked by index")
    return varying


def _agreeing(operation: OperationView, indices: Sequence[Value], shape: Sequence[int]) -> Labels:
    """Returns the labels of the axes that indices broadcast to; those that stand on one place become one."""
    algebra = operation.algebra
    labels: Labels = [algebra.replicated(size) for size in shape]
    for index in indices:
        for axis, label in enumerate(index.labels):
            place = axis + len(shape) - len(index.labels)
            algebra.touch(label)
            if index.shape[axis] == shape[place]:
                labels[place] = algebra.unify(labels[place], label)
    return labels


def _block(operation: OperationView, indices: Sequence[Value | None]) -> Labels | None:
    """Returns the labels where constant indices pick one block of consecutive entries, as ``x[..., [-2], :]`` does."""
    axes = [axis for axis, index in enumerate(indices) if index is not None]
    places = _constant_places(indices[axes[0]]) if len(axes) == 1 else None
    if places is None:
        return None
    size = operation.shape("self")[axes[0]]
    places = [place % size for place in places]
    start, count = places[0], len(places)
    if places != list(range(start, start + count)):
        return None
    blocks = operation.algebra.cut(operation.labels("self"), axes[0], [start, count, size - start - count])
    return None if blocks is None else blocks[1 if start else 0]


def _constant_places(index: Value | None) -> list[int] | None:
    """Returns the numbers in an index that is a constant list of them; None for any other."""
    if index is None or index.constant is None or len(index.shape) != 1 or index.is_floating:
        return None
    return None if index.constant.dtype.is_floating_point else [int(place) for place in index.constant]


def _is_constant(label: object) -> bool:
    return isinstance(label, Replicated)


def _index_select(operation: OperationView) -> list[Labels]:
    labels = operation.labels("self")
    axis = operation.axes("self", "dim")[0]
    _pin(operation, [labels[axis], *operation.labels("index")], "entries are picked by their place")
    labels[axis] = operation.algebra.pinned(operation.output_shapes[0][axis], "picked by index")
    return [labels]


def _gather(operation: OperationView) -> list[Labels]:
    """Picks along one axis, with an index per entry of the others; those are walked together where they are equal."""
    algebra = operation.algebra
    name = "index" if "index" in operation.arguments else "indices"
    labels, index = operation.labels("self"), operation.value(name)
    axis = operation.axes("self", "dim")[0]
    _pin(operation, [labels[axis], index.labels[axis]], "entries are picked by their place")
    gathered: Labels = []
    for place, label in enumerate(labels):
        if place == axis:
            gathered.append(algebra.pinned(index.shape[place], "picked by index"))
        elif index.shape[place] == operation.shape("self")[place]:
            gathered.append(algebra.unify(label, index.labels[place]))
        else:
            _pin(operation, [label, index.labels[place]], "only the first entries are picked from")
            gathered.append(algebra.pinned(index.shape[place], "picked by index"))
    return [gathered]


def _written(operands: Sequence[str]) -> Callable[[OperationView], list[Labels]]:
    """Entries along one axis are replaced by place; the other axes are those of what is written."""

    def rule(operation: OperationView) -> list[Labels]:
        algebra = operation.algebra
        labels = operation.labels("self")
        axis = operation.axes("self", "dim")[0]
        algebra.pin(labels[axis], "entries are written by their place")
        for name in operands:
            value = operation.argument(name)
            if not isinstance(value, Value):
                continue
            for place, label in enumerate(value.labels):
                if place == axis or len(value.labels) != len(labels):
                    algebra.pin(label, "entries are written by their place")
                elif value.shape[place] == operation.shape("self")[place]:
                    labels[place] = algebra.unify(labels[place], label)
                else:
                    _pin(operation, [label, labels[place]], "written into a part")
        labels[axis] = algebra.pinned(operation.output_shapes[0][axis], "written by place")
        return [_never_constant(operation, labels)]

    return rule


def _never_constant(operation: OperationView, labels: Labels) -> Labels:
    """Returns labels of a tensor into which something was written: what was constant may vary now."""
    return [
        operation.algebra.pinned(operation.algebra.size(label), "written into a constant")
        if _is_constant(label)
        else label
        for label in labels
    ]


def _slice_scatter(operation: OperationView) -> list[Labels]:
    """Blocks along an axis are replaced: the axis becomes what was before, what is written, and what was after."""
    algebra = operation.algebra
    labels, source = operation.labels("self"), operation.labels("src")
    axis = operation.axes("self", "dim", [0])[0]
    size, count = operation.shape("self")[axis], operation.shape("src")[axis]
    start = operation.argument("start", 0)
    start = min(max(start + size if start < 0 else start, 0), size)
    if operation.argument("step", 1) != 1:
        raise RuleError("every n-th entry is written")
    if count == size:
        for label in labels:
            algebra.touch(label)
        return [source]
    blocks = algebra.cut(labels, axis, [start, count, size - start - count])
    if blocks is None:
        raise RuleError("written across its blocks")
    rest = iter(blocks)
    pieces = [next(rest)] if start else []
    next(rest)
    pieces.append(source)
    pieces += [next(rest)] if start + count < size else []
    # What is overwritten is gone, but its axis was looked at.
    return [algebra.concat(pieces, axis)]


def _select_scatter(operation: OperationView) -> list[Labels]:
    algebra = operation.algebra
    labels, source = operation.labels("self"), operation.labels("src")
    axis = operation.axes("self", "dim")[0]
    size = operation.shape("self")[axis]
    index = operation.argument("index", 0) % size
    written = [*source[:axis], algebra.replicated(1), *source[axis:]]
    blocks = algebra.cut(labels, axis, [index, 1, size - index - 1])
    if blocks is None:
        raise RuleError("written across its blocks")
    before, after = index > 0, index + 1 < size
    pieces = [blocks[0]] * before + [written] + [blocks[-1]] * after
    return [algebra.concat(pieces, axis)]


def _index_put(operation: OperationView) -> list[Labels]:
    """Writes along the indexed axes, which stay in order, as do the indices; other axes are those of the values."""
    algebra = operation.algebra
    labels, indices = operation.labels("self"), list(operation.argument("indices"))
    values = operation.value("values")
    rest = []
    for axis, label in enumerate(labels):
        if axis < len(indices) and indices[axis] is not None:
            _pin(operation, [label, *indices[axis].labels], "entries are written by their place")
        else:
            rest.append(axis)
    for place, label in enumerate(reversed(values.labels)):
        size = values.shape[-1 - place]
        axis = rest[-1 - place] if place < len(rest) else None
        if axis is not None and axis == len(labels) - 1 - place and operation.shape("self")[axis] == size:
            labels[axis] = algebra.unify(labels[axis], label)
        elif size != 1:
            _pin(operation, [label] if axis is None else [label, labels[axis]], "written by place")
    return [_never_constant(operation, labels)]


INDEXING: dict[str, NodeRule] = {
    "aten.index.Tensor": FunctionRule(_index),
    "aten.index_select": FunctionRule(_index_select),
    "aten.gather": FunctionRule(_gather),
    "aten.take_along_dim": FunctionRule(_gather),
    "aten.slice_scatter": FunctionRule(_slice_scatter),
    "aten.select_scatter": FunctionRule(_select_scatter),
    "aten.index_put": FunctionRule(_index_put),
    "aten.index_add": FunctionRule(_written(("index", "source"))),
    "aten.index_copy": FunctionRule(_written(("index", "source"))),
    "aten.index_fill": FunctionRule(_written(("index",))),
    "aten.scatter": FunctionRule(_written(("index", "src"))),
    "aten.scatter_reduce": FunctionRule(_written(("index", "src"))),
    "aten.index_reduce": FunctionRule(_written(("index", "source"))),
    "aten._unsafe_index": FunctionRule(_index),
    "aten._unsafe_index_put": FunctionRule(_index_put),
    "aten.scatter_add": FunctionRule(_written(("index", "src"))),
    **{f"aten.{name}": _ordered(_SCAN) for name in ("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")},
    "aten.argsort": _ordered("sorted along this axis"),
    "aten.flip": _ordered("reversed", "dims"),
    "aten.roll": _ordered("rolled", "dims"),
}
