"""Rules of operations that repeat tensors against each other, and of diagonals."""

from __future__ import annotations

from mergekit_ot import FunctionRule, Labels, NodeRule, OperationView


def _spread(operation: OperationView) -> list[Labels]:
    """Tensors are repeated until they have one shape."""
    algebra = operation.algebra
    outputs: list[Labels] = []
    for value, shape in zip(operation.argument("tensors"), operation.output_shapes, strict=True):
        labels: Labels = [algebra.replicated(size) for size in shape]
        for place in range(-len(value.labels), 0):
            algebra.touch(value.labels[place])
            if value.shape[place] == shape[place]:
                labels[place] = value.labels[place]
        outputs.append(labels)
    return outputs


def _grid(operation: OperationView) -> list[Labels]:
    """Each tensor runs along an axis of its own, and is repeated along the others."""
    algebra = operation.algebra
    values = operation.argument("tensors")
    places = list(range(len(values)))
    if operation.argument("indexing", "ij") == "xy" and len(places) > 1:
        places[:2] = [1, 0]
    outputs: list[Labels] = []
    for number, shape in enumerate(operation.output_shapes):
        labels: Labels = [algebra.replicated(size) for size in shape]
        if values[number].labels:
            labels[places[number]] = values[number].labels[0]
        outputs.append(labels)
    return outputs


def _stacked(axis: int) -> NodeRule:
    """Tensors joined along one axis, after axes of one were added where they are too few."""

    def rule(operation: OperationView) -> list[Labels]:
        values = operation.argument("tensors")
        rank, unit = len(operation.output_shapes[0]), operation.algebra.replicated(1)
        place = axis if axis < rank else 0
        tensors: list[Labels] = []
        for value in values:
            labels, missing = list(value.labels), rank - len(value.labels)
            if axis == 2 and missing:  # rows become 1 × n × 1
                labels = [unit, *labels, unit] if missing == 2 else [*labels, unit]
            elif missing:
                labels = [*labels, unit] if axis == 1 else [unit, *labels]
            tensors.append(labels)
        return [operation.algebra.concat(tensors, place)]

    return FunctionRule(rule, is_movement=True)


def _on_or_of_diagonal(operation: OperationView) -> list[Labels]:
    """A vector becomes a diagonal matrix, a matrix its diagonal."""
    if len(operation.shape("self")) == 1:
        return _on_diagonal(operation, "diagonal")
    return _diagonal(operation, "diagonal")


def _diagonal(operation: OperationView, offset: str = "offset") -> list[Labels]:
    """Rows and columns of the same number meet, so that both have one order."""
    algebra = operation.algebra
    labels, rank = operation.labels("self"), len(operation.shape("self"))
    first, second = operation.argument("dim1", 0) % rank, operation.argument("dim2", 1) % rank
    rest = [label for axis, label in enumerate(labels) if axis not in (first, second)]
    if operation.argument(offset, 0) or operation.shape("self")[first] != operation.shape("self")[second]:
        for axis in (first, second):
            algebra.pin(labels[axis], "a diagonal is taken")
        return [[*rest, algebra.pinned(operation.output_shapes[0][-1], "a diagonal is taken")]]
    common = algebra.unify(labels[first], labels[second])
    algebra.touch(common)
    if "trace" in operation.name:
        operation.loop([*rest, common])
        return [rest]
    return [[*rest, common]]


def _on_diagonal(operation: OperationView, offset: str = "offset") -> list[Labels]:
    """An axis becomes the rows and the columns of a matrix that is zero off its diagonal."""
    *rest, label = operation.labels("self")
    rank = len(operation.output_shapes[0])
    places = sorted(operation.argument(name, place) % rank for name, place in (("dim1", -2), ("dim2", -1)))
    if operation.argument(offset, 0):
        operation.algebra.pin(label, "on a diagonal off the middle")
        label = operation.algebra.pinned(operation.output_shapes[0][places[0]], "on a diagonal off the middle")
    for place in places:
        rest.insert(place, label)
    return [rest]


ARRANGING: dict[str, NodeRule] = {
    "aten.broadcast_tensors": FunctionRule(_spread, is_movement=True),
    "aten.meshgrid": FunctionRule(_grid, is_movement=True),
    **{f"aten.{name}": FunctionRule(_diagonal) for name in ("diagonal", "linalg_diagonal", "trace")},
    "aten.diag": FunctionRule(_on_or_of_diagonal),
    **{f"aten.{name}": _stacked(0) for name in ("vstack", "row_stack")},
    **{f"aten.{name}": _stacked(1) for name in ("hstack", "column_stack")},
    "aten.dstack": _stacked(2),
    "aten.diag_embed": FunctionRule(_on_diagonal),
}
