"""Rules of distances and similarities between vectors, and of matrices that are inverted or solved with."""

from __future__ import annotations

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


_DISTANCES = EinRule("... p m; ... r m -> ... p r", ("x1", "x2"))

DISTANCES: dict[str, NodeRule] = {
    **{f"aten.{name}": _DISTANCES for name in ("cdist", "_cdist_forward", "_euclidean_dist")},
    **{f"aten.{name}": FunctionRule(_between_rows) for name in ("pdist", "_pdist_forward")},
    "aten.cosine_similarity": _along("x1", "x2", 1),
    "aten.pairwise_distance": _along("x1", "x2", -1),
    "aten.linalg_vecdot": _along("x", "y", -1),
    "aten.inner": EinRule("... k; k -> ...", ("self", "other")),
    "aten.kron": FunctionRule(_kronecker),
    "aten.ger": EinRule("m; n -> m n", ("self", "vec2")),
    "aten.addr": EinRule("m n; m; n -> m n", ("self", "vec1", "vec2")),
    "aten.addbmm": EinRule("b m k; b k n; m n -> m n", ("batch1", "batch2", "self")),
    **{f"aten.{name}": FunctionRule(_inverse) for name in ("linalg_inv", "inverse", "linalg_inv_ex", "linalg_pinv")},
    **{f"aten.{name}": FunctionRule(_inverse) for name in ("linalg_pinv.atol_rtol_tensor", "pinverse")},
    "aten.linalg_solve": EinRule("... i j; ... i k -> ... j k", ("A", "B")),
}
