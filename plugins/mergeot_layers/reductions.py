"""Rules of operations that sum, average or normalise along axes."""

from __future__ import annotations

from collections.abc import Callable

from mergekit_ot import FunctionRule, Labels, NodeRule, OperationView, RuleError

# The axes of a matrix norm that names none.
_MATRIX = (-2, -1)


def _reduce(operation: OperationView, axes: list[int] | None = None) -> list[Labels]:
    """Removes the reduced axes; their order does not matter to a sum, a mean or a maximum."""
    axes = operation.axes("self", "dim", _MATRIX if "matrix_norm" in operation.name else None) if axes is None else axes
    axes = axes or operation.axes("self", "missing")  # an empty list means every axis
    operation.mix("self", axes)
    keep = bool(operation.argument("keepdim", False))
    labels = operation.labels("self")
    unit = operation.algebra.replicated(1)
    left = [unit if i in axes else label for i, label in enumerate(labels) if keep or i not in axes]
    return [list(left) for _ in operation.output_shapes]


def _ranked(operation: OperationView) -> list[Labels]:
    """A maximum with its index: the index names a place, so the axis stays as it is, unless no one reads the index."""
    axes = operation.axes("self", "dim", [-1] if _is_last(operation) else None)
    is_place_read = len(operation.output_shapes) == 1 or 1 not in operation.unread
    for axis in axes if is_place_read else ():
        operation.algebra.pin(operation.labels("self")[axis], "an index into this axis is returned")
    return _reduce(operation, axes)


def _is_last(operation: OperationView) -> bool:
    """Whether the operation runs along the last axis where it names none."""
    return operation.name.split(".")[1] in ("kthvalue", "mode")


def _sorted(operation: OperationView) -> list[Labels]:
    """Entries in order of their size; which were they is told by an index, which keeps the axis if it is read."""
    algebra = operation.algebra
    labels = operation.labels("self")
    (axis,) = operation.axes("self", "dim", [-1])
    if 1 in operation.unread:
        operation.mix("self", [axis])
    else:
        algebra.pin(labels[axis], "sorted along this axis")
    labels[axis] = algebra.pinned(operation.output_shapes[0][axis], "sorted along this axis")
    return [list(labels) for _ in operation.output_shapes]


def _scaled(operation: OperationView) -> list[Labels]:
    """Slices along one axis are scaled to a length at most."""
    labels = operation.labels("self")
    axis = operation.axes("self", "dim")[0]
    operation.mix("self", [place for place in range(len(labels)) if place != axis])
    operation.carried = list(range(len(labels)))
    return [labels]


def _counted(operation: OperationView) -> list[Labels]:
    """How often values come, wherever they stand."""
    operation.mix("self", list(range(len(operation.labels("self")))))
    for value in operation.tensors[1:]:
        for label in value.labels:
            operation.algebra.pin(label, "counted entry by entry")
            for other in operation.labels("self"):
                operation.algebra.pin(other, "counted entry by entry")
    return [[operation.algebra.pinned(size, "bins in order") for size in operation.output_shapes[0]]]


def _apart(operation: OperationView) -> list[Labels]:
    """The length of a difference: entries that meet are the same, and their order does not matter."""
    ours, theirs = operation.labels("self"), operation.labels("other")
    for place in range(-min(len(ours), len(theirs)), 0):
        if operation.shape("self")[place] == operation.shape("other")[place]:
            ours[place] = operation.algebra.unify(ours[place], theirs[place])
    for label in theirs:
        operation.algebra.touch(label)
    operation.mix("self", list(range(len(ours))))
    return [[]]


def _matmul(operation: OperationView) -> list[Labels]:
    """Batched product with broadcasting; vectors count as a row or a column."""
    algebra = operation.algebra
    first, second = operation.labels("self"), operation.labels("other")
    ranks = len(first), len(second)
    inner = (ranks[0] - 1, ranks[1] - 2 if ranks[1] > 1 else 0)
    algebra.unify(first[inner[0]], second[inner[1]])
    operation.contract("self", inner[0])
    operation.contract("other", inner[1])
    rows = first[-2:-1] if ranks[0] > 1 else []
    columns = second[-1:] if ranks[1] > 1 else []
    shape = operation.output_shapes[0]
    count = len(shape) - len(rows) - len(columns)
    batch = [algebra.replicated(size) for size in shape[:count]]
    for labels, sizes in ((first[:-2], operation.shape("self")), (second[:-2], operation.shape("other"))):
        for axis, label in enumerate(labels):
            position = axis + count - len(labels)
            algebra.touch(label)
            if sizes[axis] == shape[position]:
                batch[position] = algebra.unify(batch[position], label)
    operation.loop([*batch, *rows, *columns, first[inner[0]]])
    return [[*batch, *rows, *columns]]


def _layer_norm(operation: OperationView) -> list[Labels]:
    """Normalises over the last axes, which scale and shift share."""
    algebra = operation.algebra
    labels = operation.labels("input")
    count = len(operation.argument("normalized_shape"))
    first = len(labels) - count
    for name in ("weight", "bias"):
        if operation.argument(name) is not None:
            for axis, label in enumerate(operation.labels(name)):
                labels[first + axis] = algebra.unify(labels[first + axis], label)
    operation.mix("input", list(range(first, len(labels))))
    for label in labels[first:]:
        algebra.flag(label, "uniform marginals only")
    statistics = [*labels[:first], *[algebra.replicated(1)] * count]
    return [labels, *[list(statistics) for _ in operation.output_shapes[1:]]]


def _weight_norm(operation: OperationView) -> list[Labels]:
    """Scales the slices along one axis of a weight to lengths that are parameters of their own (arXiv:1602.07868)."""
    algebra = operation.algebra
    labels, lengths = operation.labels("v"), operation.labels("g")
    axis = operation.argument("dim", 0)
    for place, label in enumerate(lengths):
        algebra.touch(label)
        if place == axis % len(labels) and len(lengths) > 1:
            labels[place] = algebra.unify(labels[place], label)
    operation.mix("v", [place for place in range(len(labels)) if place != axis % len(labels)])
    # A slice is normalised over all its other axes, so nothing on them may depend on which slice it is.
    operation.carried = list(range(len(labels)))
    return [labels, *[list(operation.labels("g")) for _ in operation.output_shapes[1:]]]


def _softmax(operation: OperationView) -> list[Labels]:
    axes = operation.axes("self", "dim")
    operation.mix("self", axes)
    labels = operation.labels("self")
    for axis in axes:
        operation.algebra.flag(labels[axis], "size-sensitive")
    return [labels]


def _gated(operation: OperationView) -> list[Labels]:
    """A gated linear map multiplies one half of an axis with the other."""
    labels = operation.labels("self")
    axis = operation.axes("self", "dim", [-1])[0]
    half = operation.output_shapes[0][axis]
    halves = operation.algebra.cut(labels, axis, [half, half])
    if halves is None:
        raise RuleError("the gated axis does not divide into halves")
    return [[operation.algebra.unify(value, gate) for value, gate in zip(*halves, strict=True)]]


def _rule(function: Callable[[OperationView], list[Labels]]) -> NodeRule:
    return FunctionRule(function)


_SOFTMAX = [
    "softmax",
    "_softmax",
    "log_softmax",
    "_log_softmax",
    "_safe_softmax",
    "special_softmax",
    "special_log_softmax",
]

REDUCTIONS: dict[str, NodeRule] = {
    **{
        f"aten.{name}": _rule(_reduce)
        for name in (
            "mean",
            "sum",
            "amax",
            "amin",
            "prod",
            "logsumexp",
            "linalg_vector_norm",
            "var",
            "std",
            "any",
            "all",
            "nansum",
            "nanmean",
            "var_mean",
            "std_mean",
            "aminmax",
            "count_nonzero",
            "norm",
            "linalg_norm",
            "linalg_matrix_norm",
            "frobenius_norm",
            "nuclear_norm",
            "_is_all_true",
            "_is_any_true",
            "special_logsumexp",
        )
    },
    **{f"aten.{name}.default": _rule(_reduce) for name in ("median", "nanmedian")},
    "aten.max.default": _rule(_reduce),
    "aten.min.default": _rule(_reduce),
    **{f"aten.{name}.dim": _rule(_ranked) for name in ("max", "min", "median", "nanmedian")},
    **{f"aten.{name}": _rule(_ranked) for name in ("kthvalue", "mode")},
    **{f"aten.{name}": _rule(_sorted) for name in ("sort", "topk")},
    "aten.renorm": _rule(_scaled),
    "aten.dist": _rule(_apart),
    **{f"aten.{name}": _rule(_counted) for name in ("histc", "bincount")},
    "aten.argmax": _rule(_ranked),
    "aten.argmin": _rule(_ranked),
    "aten.matmul": _rule(_matmul),
    "aten.layer_norm": _rule(_layer_norm),
    "aten.rms_norm": _rule(_layer_norm),
    "aten._fused_rms_norm": _rule(_layer_norm),
    "aten.native_layer_norm": _rule(_layer_norm),
    **{f"aten.{name}": _rule(_weight_norm) for name in ("_weight_norm", "_weight_norm_interface")},
    **{f"aten.{name}": _rule(_softmax) for name in _SOFTMAX},
    "aten.glu": _rule(_gated),
}
