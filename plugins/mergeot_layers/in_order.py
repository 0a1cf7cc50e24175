"""Rules of operations to which the order along some axes matters: steps, triangles, decompositions, classes."""

from __future__ import annotations

from mergekit_ot import FunctionRule, Labels, NodeRule, OperationView

_STEPS = "computed in order along this axis"


def _pin(operation: OperationView, labels: Labels, why: str) -> None:
    for label in labels:
        operation.algebra.pin(label, why)


def _steps(first: str, *others: str) -> NodeRule:
    """Neighbours along one axis are compared, or its few entries multiplied crosswise; other axes meet."""

    def rule(operation: OperationView) -> list[Labels]:
        algebra = operation.algebra
        labels = operation.labels(first)
        named = operation.argument("dim")
        axis = next(i for i, size in enumerate(operation.shape(first)) if size == 3) if named is None else named
        axis %= len(labels)
        for name in (first, *others):
            if operation.argument(name) is None:
                continue
            for place, label in enumerate(operation.labels(name)):
                if place == axis:
                    algebra.pin(label, _STEPS)
                elif operation.shape(name)[place] == operation.shape(first)[place]:
                    labels[place] = algebra.unify(labels[place], label)
                else:
                    algebra.pin(label, _STEPS)
        labels[axis] = algebra.pinned(operation.output_shapes[0][axis], _STEPS)
        return [labels]

    return FunctionRule(rule)


def _pinned_by(why: str, axes: int | None = None) -> NodeRule:
    """All axes of all operands stay in order, or the last ones of the first operand, for a reason that is known."""

    def rule(operation: OperationView) -> list[Labels]:
        kept: Labels = []
        for number, value in enumerate(operation.tensors):
            count = 0 if axes is None or number else max(len(value.labels) - axes, 0)
            _pin(operation, value.labels[count:], why)
            kept = kept if number else list(value.labels[:count])
        outputs: list[Labels] = []
        for shape in operation.output_shapes:
            rest = [operation.algebra.pinned(size, why) for size in shape[len(kept) :]]
            outputs.append([*kept[: len(shape)], *rest])
        return outputs

    return FunctionRule(rule)


def _flipped(axis: int) -> NodeRule:
    def rule(operation: OperationView) -> list[Labels]:
        labels = operation.labels("self")
        operation.algebra.pin(labels[axis], "reversed")
        return [labels]

    return FunctionRule(rule)


def _triangle(operation: OperationView) -> list[Labels]:
    """A triangle of a matrix is kept: its rows and columns stay in order."""
    labels = operation.labels("self")
    _pin(operation, labels[-2:], "a triangle is kept")
    return [labels]


def _one_hot(operation: OperationView) -> list[Labels]:
    (shape,) = operation.output_shapes
    return [[*operation.labels("self"), operation.algebra.pinned(shape[-1], "classes in order")]]


_CLASS_LOSSES = ("cross_entropy_loss", "nll_loss", "nll_loss_nd", "nll_loss2d", "ctc_loss", "_ctc_loss")
_DECOMPOSITIONS = (
    *("cholesky", "linalg_cholesky", "linalg_cholesky_ex", "linalg_qr", "qr", "linalg_svd", "svd", "_linalg_svd"),
    *("linalg_svdvals", "linalg_eigh", "_linalg_eigh", "linalg_eigvalsh", "linalg_eig", "linalg_eigvals", "linalg_lu"),
    *("linalg_lu_factor", "linalg_det", "_linalg_det", "det", "logdet", "linalg_slogdet", "_linalg_slogdet", "slogdet"),
)

IN_ORDER: dict[str, NodeRule] = {
    **{f"aten.{name}": FunctionRule(_triangle) for name in ("tril", "triu")},
    "aten.diff": _steps("self", "prepend", "append"),
    **{f"aten.{name}": _steps("self", "other") for name in ("cross", "linalg_cross")},
    **{f"aten.{name}": _steps("y") for name in ("cumulative_trapezoid.dx",)},
    "aten.masked_scatter": _pinned_by("entries are filled in the order of their places"),
    **{f"aten.{name}": _pinned_by("a loss of classes in order") for name in _CLASS_LOSSES},
    **{f"aten.{name}": _pinned_by("a matrix decomposition", 2) for name in _DECOMPOSITIONS},
    "aten.vander": _pinned_by("powers in order"),
    "aten.one_hot": FunctionRule(_one_hot),
    **{f"aten.{name}": _flipped(axis) for name, axis in (("fliplr", 1), ("flipud", 0))},
}
