"""Rules of operations that sum, average or normalise along axes."""

from __future__ import annotations

from collections.abc import Callable

from mergekit_ot import FunctionRule, Labels, NodeRule, OperationView, RuleError


def _reduce(operation: OperationView) -> list[Labels]:
    """Removes the reduced axes; their order does not matter to a sum, a mean or a maximum."""
    axes = operation.axes("self", "dim")
    axes = axes or operation.axes("self", "missing")  # an empty list means every axis
    operation.mix("self", axes)
    keep = bool(operation.argument("keepdim", False))
    labels = operation.labels("self")
    unit = operation.algebra.replicated(1)
    left = [unit if i in axes else label for i, label in enumerate(labels) if keep or i not in axes]
    return [list(left) for _ in operation.output_shapes]


def _ranked(operation: OperationView) -> list[Labels]:
    """A maximum with its index: the index names a place, so the axis stays as it is."""
    axes = operation.axes("self", "dim")
    for axis in axes:
        operation.algebra.pin(operation.labels("self")[axis], "an index into this axis is returned")
    return _reduce(operation)


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
    return [labels]


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
    return [labels]


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
        )
    },
    "aten.norm.ScalarOpt_dim": _rule(_reduce),
    "aten.max.default": _rule(_reduce),
    "aten.min.default": _rule(_reduce),
    "aten.max.dim": _rule(_ranked),
    "aten.min.dim": _rule(_ranked),
    "aten.argmax": _rule(_ranked),
    "aten.argmin": _rule(_ranked),
    "aten.matmul": _rule(_matmul),
    "aten.layer_norm": _rule(_layer_norm),
    "aten.rms_norm": _rule(_layer_norm),
    "aten._fused_rms_norm": _rule(_layer_norm),
    "aten._weight_norm": _rule(_weight_norm),
    **{f"aten.{name}": _rule(_softmax) for name in ("softmax", "_softmax", "log_softmax", "_log_softmax")},
    "aten.glu": _rule(_gated),
}
