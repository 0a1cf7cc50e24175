"""Norms of a captured program: torch's own and those that are spelled out, with their gains and biases."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace

from torch import fx

from mergekit_ot.graph.capture.program import named_arguments, operation_name, shape_of
from mergekit_ot.graph.normal_form.maps import ProgramView
from mergekit_ot.graph.normal_form.tracking import IDENTITIES, stripped

_LAYER = ("aten.layer_norm", "aten.native_layer_norm")
_ROOT_MEAN_SQUARE = ("aten.rms_norm", "aten._fused_rms_norm")
# What a spelled-out norm makes its scale of.
_REDUCTIONS = frozenset(("aten.mean", "aten.sum", "aten.var", "aten.norm", "aten.linalg_vector_norm"))
_SCALES = _REDUCTIONS | frozenset(
    (
        *("aten.rsqrt", "aten.sqrt", "aten.reciprocal", "aten.pow", "aten.square", "aten.mul", "aten.div", "aten.add"),
        *("aten.sub", "aten.clamp_min", "aten.clamp", "aten.maximum", "aten.expand", "aten.expand_as"),
        *("aten.unsqueeze", "aten.view"),
    )
)


@dataclass(frozen=True)
class Norm:
    """A norm over the last axis.

    Attributes:
        source: The operation whose result it reads.
        end: The operation that holds its result, gain and bias included.
        size: How many neurons it normalises.
        is_centred: Whether it subtracts the mean first, as LayerNorm does.
        gain: Described name of its gain, or None.
        bias: Described name of its bias, or None.
        offset: What the forward adds to the gain.
        inner: The operations that read the source, between it and the result.
        affine: The operations that read gain and bias.
    """

    source: fx.Node
    end: fx.Node
    size: int
    is_centred: bool
    gain: str | None = None
    bias: str | None = None
    offset: float = 0.0
    inner: frozenset[fx.Node] = frozenset()
    affine: frozenset[fx.Node] = field(default=frozenset())


def find_norms(view: ProgramView) -> list[Norm]:
    """Returns the norms of a program, in its order."""
    norms = []
    for node in view.nodes:
        norm = _norm(view, node) if node in view.live and node.op == "call_function" else None
        if norm is not None:
            norms.append(_with_affine(view, norm))
    return norms


def _norm(view: ProgramView, node: fx.Node) -> Norm | None:
    operation = operation_name(node)
    if operation in (*_LAYER, *_ROOT_MEAN_SQUARE):
        return _of_torch(view, node, operation in _LAYER)
    if operation in ("aten.mul", "aten.div"):
        return _spelled(view, node, operation)
    return None


def _of_torch(view: ProgramView, node: fx.Node, is_centred: bool) -> Norm | None:
    arguments = named_arguments(node)
    sizes, source = arguments["normalized_shape"], arguments["input"]
    end = node
    if isinstance(node.meta.get("val"), tuple | list):
        results = [user for user in view.users(node) if user.target is operator.getitem]
        if len(results) != 1 or results[0].args[1] != 0:
            return None
        end = results[0]
    if len(sizes) != 1 or not isinstance(source, fx.Node):
        return None
    norm = Norm(source, end, int(sizes[0]), is_centred, inner=frozenset((node,)))
    for argument in ("weight", "bias"):
        if arguments.get(argument) is None:
            continue
        vector = _vector(view, arguments[argument], norm.size, node)
        if vector is None:
            return None
        name, offset, reader = vector
        norm = replace(norm, affine=norm.affine | {reader})
        norm = replace(norm, gain=name, offset=offset) if argument == "weight" else replace(norm, bias=name)
        if argument == "bias" and offset:
            return None
    return norm


def _vector(view: ProgramView, value: object, size: int, user: fx.Node) -> tuple[str, float, fx.Node] | None:
    """Returns the parameter that a value is up to a number added to it, the number, and what reads the parameter."""
    node, offset, reader = stripped(value), 0.0, user
    if isinstance(node, fx.Node) and operation_name(node) == "aten.add" and named_arguments(node)["alpha"] == 1:
        first, second = node.args[:2]
        number, vector = (first, second) if isinstance(first, int | float) else (second, first)
        if not isinstance(number, int | float):
            return None
        node, offset, reader = stripped(vector), float(number), node
    held = view.held(node)
    if held is None:
        return None
    shape = view.graph_shape(held.name)
    # All numbers of the parameter along the last axis, whatever axes of one stand around it.
    value_shape = shape_of(node.meta.get("val")) if isinstance(node, fx.Node) else None
    if not shape or shape[-1] != size or sum(n > 1 for n in shape) > 1 or not value_shape or value_shape[-1] != size:
        return None
    return held.name, offset, reader


def _spelled(view: ProgramView, node: fx.Node, operation: str) -> Norm | None:
    """Returns the norm that a product of a value with a scale of itself is."""
    first, second = node.args[:2]
    pairs = [(first, second)] if operation == "aten.div" else [(first, second), (second, first)]
    for value, scale in pairs:
        if not isinstance(value, fx.Node) or not isinstance(scale, fx.Node):
            continue
        shape, base = shape_of(value.meta.get("val")), stripped(value)
        if not shape or not isinstance(base, fx.Node) or shape_of(node.meta.get("val")) != shape:
            continue
        inner = _inner_of(scale, base)
        if inner is None:
            continue
        source, is_centred, difference = _source_of(base, inner)
        return Norm(source, node, shape[-1], is_centred, inner=inner | difference | {node})
    return None


def _inner_of(scale: fx.Node, base: fx.Node) -> frozenset[fx.Node] | None:
    """Returns the operations by which a scale is made of a value alone, over its last axis; None otherwise."""
    shape = shape_of(base.meta.get("val")) or ()
    start = {base, *_difference(base)}
    seen: set[fx.Node] = set()
    waiting, has_reduction = [scale], False
    while waiting:
        node = waiting.pop()
        if node in start or node in seen:
            continue
        if operation_name(node) not in _SCALES | IDENTITIES:
            return None
        seen.add(node)
        has_reduction |= operation_name(node) in _REDUCTIONS and _is_over_last(node, len(shape))
        waiting += node.all_input_nodes
    return frozenset(seen) if has_reduction else None


def _is_over_last(node: fx.Node, rank: int) -> bool:
    axes = named_arguments(node).get("dim")
    axes = [axes] if isinstance(axes, int) else axes
    return bool(axes) and [axis % rank for axis in axes] == [rank - 1]


def _difference(base: fx.Node) -> tuple[fx.Node, ...]:
    """Returns what stands before a difference of a value and its mean: the value, casts passed."""
    if operation_name(base) != "aten.sub" or named_arguments(base)["alpha"] != 1:
        return ()
    value, mean = stripped(base.args[0]), stripped(base.args[1])
    if not isinstance(value, fx.Node) or not isinstance(mean, fx.Node) or operation_name(mean) != "aten.mean":
        return ()
    rank = len(shape_of(value.meta.get("val")) or ())
    return (value,) if stripped(mean.args[0]) is value and _is_over_last(mean, rank) else ()


def _source_of(base: fx.Node, inner: frozenset[fx.Node]) -> tuple[fx.Node, bool, frozenset[fx.Node]]:
    """Returns what a spelled-out norm reads, whether it subtracts the mean, and what reads the source for that."""
    difference = _difference(base)
    if not difference:
        return base, False, frozenset()
    mean = stripped(base.args[1])
    readers = {base, *inner} | ({mean} if isinstance(mean, fx.Node) else set())
    return difference[0], True, frozenset(readers)


def _with_affine(view: ProgramView, norm: Norm) -> Norm:
    """Returns a norm with the gain and bias that alone read its result."""
    while norm.bias is None:
        users = view.users(norm.end)
        if len(users) != 1:
            return norm
        (user,) = users
        operation = operation_name(user)
        if operation in IDENTITIES:
            norm = replace(norm, end=user)
            continue
        if operation not in ("aten.mul", "aten.add"):
            return norm
        extended = _extended(view, norm, user, operation == "aten.mul")
        if extended is None:
            return norm
        norm = extended
    return norm


def _extended(view: ProgramView, norm: Norm, user: fx.Node, is_product: bool) -> Norm | None:
    first, second = user.args[:2]
    other = second if first is norm.end else first
    if is_product and isinstance(other, int | float) and norm.gain is None:
        return replace(norm, end=user)
    if shape_of(user.meta.get("val")) != shape_of(norm.end.meta.get("val")):
        return None
    if is_product == (norm.gain is not None) or (not is_product and named_arguments(user)["alpha"] != 1):
        return None
    vector = _vector(view, other, norm.size, user)
    if vector is None or (not is_product and vector[1]):
        return None
    name, offset, reader = vector
    norm = replace(norm, end=user, affine=norm.affine | {reader})
    return replace(norm, gain=name, offset=offset) if is_product else replace(norm, bias=name)
