"""Rules of distances and similarities between vectors, and of matrices that are inverted or solved with."""

from __future__ import annotations

import itertools

from mergekit_ot import EinRule, FunctionRule, Labels, NodeRule, OperationView


def _along(first: str, second: str, default: int) -> NodeRule:
    """Two tensors are compared along one axis, over which the result sums; their other axes meet."""

    def rule(operation: OperationView) -> list[Labels]:
        algebra = operation.algebra
        ours, theirs = operation.value(first), operation.value(second)
        rank = max(len(ours.labels), len(theirs.labels))
        axis = operation.argument("dim", default) % rank
        labels: Labels = [algebra.replicated(1)] * rank
        sizes = [1] * rank
        for value in (ours, theirs):
            for place in range(-len(value.labels), 0):
                algebra.touch(value.labels[place])
                if value.shape[place] > 1:
                    known = sizes[place] > 1
                    labels[place] = algebra.unify(labels[place], value.labels[place]) if known else value.labels[place]
                    sizes[place] = value.shape[place]
        for value in (ours, theirs):
            place = axis - rank + len(value.labels)
            if place >= 0:
                operation.contract(value, place)
        operation.loop(labels)
        keep = [algebra.replicated(1)] if operation.argument("keepdim", False) else []
        return [[*labels[:axis], *keep, *labels[axis + 1 :]]]

    return FunctionRule(rule)


def _between_rows(operation: OperationView) -> list[Labels]:
    """Distances of all pairs of rows, in the order of the rows."""
    rows, features = operation.labels("self")
    operation.algebra.pin(rows, "pairs of rows in order")
    operation.contract("self", 1, features)
    operation.loop([rows, features])
    return [[operation.algebra.pinned(operation.output_shapes[0][0], "pairs of rows in order")]]


def _inverse(operation: OperationView) -> list[Labels]:
    """The rows of an inverse are in the order of the columns, and the other way round."""
    name = "self" if "self" in operation.arguments else "A"
    *batch, rows, columns = operation.labels(name)
    operation.loop([*batch, rows, columns])
    outputs: list[Labels] = [[*batch, columns, rows]]
    for shape in operation.output_shapes[1:]:
        outputs.append([operation.algebra.pinned(size, "status of an inverse") for size in shape])
    return outputs


def _kronecker(operation: OperationView) -> list[Labels]:
    """Every axis becomes the product of the two that meet there."""
    ours, theirs = operation.labels("self"), operation.labels("other")
    rank = max(len(ours), len(theirs))
    unit = operation.algebra.replicated(1)
    ours, theirs = [unit] * (rank - len(ours)) + ours, [unit] * (rank - len(theirs)) + theirs
    return [[operation.algebra.product([a, b]) for a, b in zip(ours, theirs, strict=True)]]


def _inner(operation: OperationView) -> list[Labels]:
    """Products summed over the last axis of both."""
    ours, theirs = operation.labels("self"), operation.labels("other")
    operation.algebra.unify(ours[-1], theirs[-1])
    operation.contract("self", len(ours) - 1)
    operation.contract("other", len(theirs) - 1)
    operation.loop([*ours, *theirs[:-1]])
    return [[*ours[:-1], *theirs[:-1]]]


def _chained(operation: OperationView) -> list[Labels]:
    """A product of matrices one after the other; the first or the last may be a vector."""
    values = operation.argument("tensors") if "tensors" in operation.arguments else operation.argument("matrices")
    for first, second in itertools.pairwise(values):
        operation.algebra.unify(first.labels[-1], second.labels[0])
        operation.contract(first, len(first.labels) - 1)
        operation.contract(second, 0)
    ends = [*values[0].labels[:-1], *values[-1].labels[1:]]
    operation.loop(list(itertools.chain.from_iterable(value.labels for value in values[:-1])))
    operation.loop(ends)
    return [ends]


def _of_a_matrix(operation: OperationView) -> list[Labels]:
    """A power or a power series of a square matrix, whose rows and columns meet."""
    *batch, rows, columns = operation.labels("self")
    common = operation.algebra.unify(rows, columns)
    operation.loop([*batch, common])
    return [[*batch, common, common]]


def _covariance(operation: OperationView) -> list[Labels]:
    """Variables on the rows are compared over all observations on the columns."""
    rows, columns = operation.labels("self")
    operation.contract("self", 1)
    for value in operation.tensors[1:]:
        for label in value.labels:
            operation.algebra.unify(label, columns)
    operation.loop([rows, columns])
    return [[rows, rows]]


_DISTANCES = EinRule("... p m; ... r m -> ... p r", ("x1", "x2"))

DISTANCES: dict[str, NodeRule] = {
    **{f"aten.{name}": _DISTANCES for name in ("cdist", "_cdist_forward", "_euclidean_dist")},
    **{f"aten.{name}": FunctionRule(_between_rows) for name in ("pdist", "_pdist_forward")},
    "aten.cosine_similarity": _along("x1", "x2", 1),
    "aten.pairwise_distance": _along("x1", "x2", -1),
    "aten.linalg_vecdot": _along("x", "y", -1),
    "aten.inner": FunctionRule(_inner),
    **{f"aten.{name}": FunctionRule(_chained) for name in ("linalg_multi_dot", "chain_matmul")},
    **{f"aten.{name}": FunctionRule(_of_a_matrix) for name in ("matrix_exp", "linalg_matrix_exp")},
    **{f"aten.{name}": FunctionRule(_of_a_matrix) for name in ("matrix_power", "linalg_matrix_power")},
    **{f"aten.{name}": FunctionRule(_covariance) for name in ("cov", "corrcoef")},
    "aten.kron": FunctionRule(_kronecker),
    "aten.ger": EinRule("m; n -> m n", ("self", "vec2")),
    "aten.addr": EinRule("m n; m; n -> m n", ("self", "vec1", "vec2")),
    "aten.addbmm": EinRule("b m k; b k n; m n -> m n", ("batch1", "batch2", "self")),
    **{f"aten.{name}": FunctionRule(_inverse) for name in ("linalg_inv", "inverse", "linalg_inv_ex", "linalg_pinv")},
    **{f"aten.{name}": FunctionRule(_inverse) for name in ("linalg_pinv.atol_rtol_tensor", "pinverse")},
    "aten.linalg_solve": EinRule("... i j; ... i k -> ... j k", ("A", "B")),
}
