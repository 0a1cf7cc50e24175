"""Rules of operations on each entry alone that torch does not mark as such, and of the parts of complex numbers."""

from __future__ import annotations

from mergekit_ot import FunctionRule, Labels, NodeRule, OperationView
from mergeot_layers.lines import broadcast, same_as_input

_PARTS = "real and imaginary part"


def _kept(operation: OperationView) -> list[Labels]:
    """The first operand in another type or place; of further ones only that is read, never an entry."""
    first, *others = operation.tensors
    for value in others:
        for label in value.labels:
            operation.algebra.touch(label)
    operation.carried = list(range(len(first.labels)))
    return [list(first.labels)]


def _loss(operation: OperationView) -> list[Labels]:
    """A loss compares entries that meet; summed or averaged, their order does not matter."""
    (shape,) = operation.output_shapes
    if shape or operation.argument("reduction", 1) == 0:
        return broadcast(operation)
    rank = max(len(value.labels) for value in operation.tensors)
    largest = max(operation.tensors, key=lambda value: len(value.labels))
    labels: Labels = list(largest.labels)
    for value in operation.tensors:
        for place in range(-len(value.labels), 0):
            operation.algebra.touch(value.labels[place])
            if value.shape[place] == largest.shape[place] and value is not largest:
                labels[rank + place] = operation.algebra.unify(labels[rank + place], value.labels[place])
    operation.scopes.append([])
    return [[]]


def _as_real(operation: OperationView) -> list[Labels]:
    return [[*operation.labels("self"), operation.algebra.pinned(2, _PARTS)]]


def _as_complex(operation: OperationView) -> list[Labels]:
    *labels, parts = operation.labels("self")
    operation.algebra.pin(parts, _PARTS)
    return [labels]


def _binned(operation: OperationView) -> list[Labels]:
    """Each entry becomes the number of its bin; the bounds are in order."""
    algebra = operation.algebra
    bounds = "boundaries" if "boundaries" in operation.arguments else "sorted_sequence"
    *outer, last = operation.labels(bounds)
    algebra.pin(last, "bounds in order")
    if operation.argument("self") is None or not operation.output_shapes[0]:
        return [[algebra.pinned(size, "bounds in order") for size in operation.output_shapes[0]]]
    labels = operation.labels("self")
    for place, label in enumerate(outer):
        labels[place] = algebra.unify(labels[place], label)
    return [labels]


_POINTWISE = [
    "absolute",
    "arccos",
    "arccosh",
    "arcsin",
    "arcsinh",
    "arctan",
    "arctan2",
    "arctanh",
    "divide",
    "true_divide",
    "floor_divide",
    "subtract",
    "multiply",
    "rsub",
    "greater",
    "greater_equal",
    "less",
    "less_equal",
    "not_equal",
    "negative",
    "fix",
    "isclose",
    "isreal",
    "complex",
    "polar",
    "conj",
    "_conj",
    "resolve_conj",
    "resolve_neg",
    "_neg_view",
    "real",
    "imag",
    "masked_fill",
    "where",
    "log_sigmoid",
    "_prelu_kernel",
    "glu_jvp",
    "_add_relu",
    "special_digamma",
    "special_erf",
    "special_erfc",
    "special_erfinv",
    "special_exp2",
    "special_expit",
    "special_expm1",
    "special_gammainc",
    "special_gammaincc",
    "special_gammaln",
    "special_i0",
    "special_log1p",
    "special_logit",
    "special_ndtr",
    "special_polygamma",
    "special_psi",
    "special_round",
    "special_sinc",
    "special_xlogy",
    "special_multigammaln",
    "log_sigmoid_forward",
]
_LOSSES = [
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "kl_div",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "poisson_nll_loss",
    "soft_margin_loss",
]
_KEPT = [
    "type_as",
    "_to_copy",
    "to",
    "contiguous",
    "lift",
    "lift_fresh",
    "lift_fresh_copy",
    "pin_memory",
    "_pin_memory",
    "chalf",
    "to_dense",
]
_CASTS = [f"_cast_{kind}" for kind in ("Byte", "Char", "Double", "Float", "Half", "Int", "Long", "Short")]

ELEMENTWISE: dict[str, NodeRule] = {
    **{f"aten.{name}": FunctionRule(broadcast) for name in _POINTWISE},
    **{f"aten.{name}": FunctionRule(_loss) for name in _LOSSES},
    **{f"aten.{name}": FunctionRule(_kept, is_movement=True) for name in (*_KEPT, *_CASTS)},
    **{f"aten.{name}": FunctionRule(same_as_input) for name in ("fill.Scalar", "zero", "new_empty_strided")},
    "aten.fill.Tensor": FunctionRule(same_as_input),
    "aten.view_as_real": FunctionRule(_as_real),
    "aten.view_as_complex": FunctionRule(_as_complex),
    "aten.bucketize": FunctionRule(_binned),
    "aten.searchsorted": FunctionRule(_binned),
}
