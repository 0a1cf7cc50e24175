"""Rules that fit one line each."""

from __future__ import annotations

from mergekit_ot import Case, EinRule, FunctionRule, Labels, NodeRule, OperationView, Value

_AFFINE = ("input", "weight", "bias")
_CONVOLUTION = EinRule("b (g i) *!; (g o) i *!; (g o) -> b (g o) *!", _AFFINE, sizes={"g": "groups"})
_TRANSPOSED = EinRule("b (g i) *!; (g i) o *!; (g o) -> b (g o) *!", _AFFINE, sizes={"g": "groups"})
_BATCH_NORM = EinRule(
    "b c *; c; c; c; c -> b c *",
    ("input", "weight", "bias", "running_mean", "running_var"),
    state=("running_mean", "running_var"),
)
_POOL = {
    1: EinRule("* l! -> * L!", ("self",)),
    2: EinRule("* h! w! -> * H! W!", ("self",)),
    3: EinRule("* d! h! w! -> * D! H! W!", ("self",)),
}
_KEEP = EinRule("* -> *", ("self",), is_movement=True)

LINES: dict[str, NodeRule] = {
    "aten.linear": EinRule("... i; o i; o -> ... o", _AFFINE),
    "aten.mm": EinRule("m k; k n -> m n", ("self", "mat2")),
    "aten.addmm": EinRule("m k; k n; n -> m n", ("mat1", "mat2", "self")),
    "aten.bmm": EinRule("b m k; b k n -> b m n", ("self", "mat2")),
    # Spectral norm keeps its two singular vectors as buffers.
    "aten.mv": EinRule("m k; k -> m", ("self", "vec"), state=("vec",)),
    "aten.dot": EinRule("k; k ->", ("self", "tensor"), state=("self", "tensor")),
    "aten.vdot": EinRule("k; k ->", ("self", "other"), state=("self", "other")),
    "aten.batch_norm": _BATCH_NORM,
    "aten._native_batch_norm_legit_no_training": _BATCH_NORM,
    # Statistics of the batch itself: the network keeps none, or is set to train.
    "aten._native_batch_norm_legit.no_stats": EinRule("~b c *~; c; c -> b c *; c; c", _AFFINE),
    "aten._native_batch_norm_legit_functional": EinRule(
        "~b c *~; c; c; c; c -> b c *; c; c; c; c",
        ("input", "weight", "bias", "running_mean", "running_var"),
        state=("running_mean", "running_var"),
    ),
    "aten.group_norm": EinRule("b (g c) *~; (g c); (g c) -> b (g c) *", _AFFINE, sizes={"g": "num_groups"}),
    "aten.native_group_norm": EinRule("b (g c) *~; (g c); (g c) -> b (g c) *", _AFFINE, sizes={"g": "group"}),
    "aten.instance_norm": EinRule(
        "b c *~; c; c; c; c -> b c *",
        ("input", "weight", "bias", "running_mean", "running_var"),
        state=("running_mean", "running_var"),
    ),
    "aten.embedding": EinRule("v! d; ... -> ... d", ("weight", "indices")),
    "aten.prelu": EinRule("b c *; c -> b c *", ("self", "weight")),
    **{f"aten.conv{n}d": _CONVOLUTION for n in (1, 2, 3)},
    **{f"aten.conv{n}d.padding": _CONVOLUTION for n in (1, 2, 3)},
    **{f"aten.conv_transpose{n}d": _TRANSPOSED for n in (1, 2, 3)},
    "aten._convolution_mode": _CONVOLUTION,
    "aten.conv_tbc": EinRule("t! b i; k! i o; o -> T! b o", ("self", "weight", "bias")),
    **{f"aten.{kind}_pool{n}d": _POOL[n] for n in (1, 2, 3) for kind in ("max", "avg", "adaptive_avg", "adaptive_max")},
    **{f"aten._adaptive_avg_pool{n}d": _POOL[n] for n in (2, 3)},
    **{f"aten.max_unpool{n}d": EinRule("b c *!; b c *! -> b c *!", ("self", "indices")) for n in (2, 3)},
    **{f"aten.max_pool{n}d_with_indices": _POOL[n] for n in (2, 3)},
    **{f"aten.{name}": _KEEP for name in ("clone", "detach", "alias", "hardswish")},
}


def _convolved(operation: OperationView) -> list[Labels]:
    """The operation that all convolutions become in a program that was lowered further."""
    return (_TRANSPOSED if operation.argument("transposed", False) else _CONVOLUTION).label(operation)


LINES |= {f"aten.{name}": FunctionRule(_convolved) for name in ("convolution", "_convolution")}


def same_as_input(operation: OperationView) -> list[Labels]:
    """A tensor made like another one is constant along every axis."""
    algebra = operation.algebra
    for value in operation.tensors:
        for label in value.labels:
            algebra.touch(label)
    return [_constant(operation, shape) for shape in operation.output_shapes]


def _constant(operation: OperationView, shape: tuple[int, ...]) -> Labels:
    """Returns the labels of a tensor that is constant along every axis."""
    return [operation.algebra.replicated(size) for size in shape]


LINES["aten.scalar_tensor"] = FunctionRule(same_as_input)
for _name in ("zeros", "ones", "full", "empty"):
    LINES |= {f"aten.{name}": FunctionRule(same_as_input) for name in (_name, f"{_name}_like", f"new_{_name}")}


def _copy(operation: OperationView) -> list[Labels]:
    """What was there is gone; the values of `src` are repeated where it is smaller."""
    algebra = operation.algebra
    for label in (*operation.labels("self"), *operation.labels("src")):
        algebra.touch(label)
    (shape,) = operation.output_shapes
    labels = _constant(operation, shape)
    source = operation.value("src")
    for place in range(-len(source.shape), 0):
        if source.shape[place] == shape[place]:
            labels[place] = source.labels[place]
    return [labels]


def _embedding_bag(operation: OperationView) -> list[Labels]:
    """Rows of a table are summed or averaged in bags; their features pass, row and bag numbers stay."""
    algebra = operation.algebra
    labels = operation.labels("weight")
    for label in (labels[0], *operation.labels("indices"), *operation.labels("offsets")):
        algebra.pin(label, "rows are picked by their number")
    weights = operation.argument("per_sample_weights")
    if isinstance(weights, Value):
        for label in weights.labels:
            algebra.pin(label, "rows are picked by their number")
    first, *others = operation.output_shapes
    more: list[Labels] = []
    for shape in others:
        more.append([algebra.pinned(size, "numbers of rows and bags") for size in shape])
    if operation.argument("mode", 0) == 2 and labels:
        algebra.touch(labels[1])  # maxima and their places: both per feature
    bags: Labels = [algebra.pinned(first[0], "bags"), labels[1]]
    return [bags, *more]


LINES |= {f"aten.{name}": FunctionRule(_embedding_bag) for name in ("embedding_bag", "_embedding_bag")}
LINES["aten.copy"] = FunctionRule(_copy)


def broadcast(operation: OperationView) -> list[Labels]:
    """Right-aligned broadcasting: axes that meet are reordered alike."""
    algebra = operation.algebra
    outputs = []
    for shape in operation.output_shapes:
        labels = _constant(operation, shape)
        places: list[tuple[Value, int]] = []
        for value in operation.tensors:
            places += [(value, axis) for axis in range(len(value.labels))]
        # Axes that carry a concatenation go first: they make the cases on other axes meet their like.
        for value, axis in sorted(places, key=lambda place: isinstance(place[0].labels[place[1]], Case)):
            position = axis + len(shape) - len(value.labels)
            algebra.touch(value.labels[axis])
            if value.shape[axis] == shape[position]:
                labels[position] = algebra.unify(labels[position], value.labels[axis])
        outputs.append(labels)
    return outputs


LINES["tag:pointwise"] = FunctionRule(broadcast)
