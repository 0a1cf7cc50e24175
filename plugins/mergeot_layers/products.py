"""Rules of attention and of products over named axes: einsum, bilinear, outer products, tensordot."""

from __future__ import annotations

from typing import Any

from mergekit_ot import EinRule, FunctionRule, Labels, NodeRule, OperationView, RuleError

SIZE_SENSITIVE = "size-sensitive"


def _attention(operation: OperationView) -> list[Labels]:
    """Queries meet keys over ``e``, weights meet values over the source positions; heads and batch pass.

    The scale divides by the root of ``e`` where none is given, so that axis is sensitive to its size.
    """
    algebra = operation.algebra
    query, key, value = (operation.labels(name) for name in ("query", "key", "value"))
    batch = _meet(operation, query[:-2], key[:-2], value[:-2])
    algebra.unify(query[-1], key[-1])
    algebra.unify(key[-2], value[-2])
    if operation.argument("scale") is None:
        algebra.flag(query[-1], SIZE_SENSITIVE)
    if operation.argument("is_causal", False):
        for label in (query[-2], key[-2]):
            algebra.pin(label, "causal attention")
    mask = operation.arguments.get("attn_mask")
    if mask is not None:
        scores = [*batch, query[-2], key[-2]]
        for place, (label, size) in enumerate(zip(reversed(mask.labels), reversed(mask.shape), strict=True), 1):
            algebra.touch(label)
            if size > 1:
                algebra.unify(scores[-place], label)
    operation.contract("query", len(query) - 1)
    operation.contract("key", len(key) - 1)
    operation.contract("value", len(value) - 2)
    algebra.flag(key[-2], SIZE_SENSITIVE)
    operation.loop([*batch, query[-2], key[-2], query[-1]])
    operation.loop([*batch, query[-2], value[-1]])
    further: list[Labels] = []
    for shape in operation.output_shapes[1:]:
        sums: Labels = [*batch, query[-2]]
        further.append(sums if len(shape) == len(sums) else [algebra.pinned(n, "state of attention") for n in shape])
    return [[*batch, query[-2], value[-1]], *further]


def _meet(operation: OperationView, query: Labels, key: Labels, value: Labels) -> Labels:
    """Returns the labels of the axes before positions; grouped queries have several heads per key and value head."""
    algebra = operation.algebra
    shapes = [operation.shape(name)[:-2] for name in ("query", "key", "value")]
    batch: Labels = []
    for place in range(-len(query), 0):
        label = query[place]
        for others, shape in ((key, shapes[1]), (value, shapes[2])):
            if -place > len(others):
                continue
            algebra.touch(others[place])
            if shape[place] == shapes[0][place]:
                label = algebra.unify(label, others[place])
            elif operation.argument("enable_gqa", False) and place == -1:
                factors = algebra.split_product(label, [shape[place], shapes[0][place] // shape[place]])
                if factors is None:
                    raise RuleError("the query heads do not divide into the key heads")
                algebra.unify(factors[0], others[place])
            elif shape[place] != 1:
                raise RuleError(f"heads of {shapes[0][place]} and {shape[place]} meet")
        batch.append(label)
    return batch


def _einsum(operation: OperationView) -> list[Labels]:
    """The equation is the rule already."""
    equation = str(operation.argument("equation")).replace(" ", "")
    return _contracted(operation, equation, list(operation.argument("tensors")))


def _contracted(operation: OperationView, equation: str, values: list[Any]) -> list[Labels]:
    algebra = operation.algebra
    left, arrow, right = equation.partition("->")
    if not arrow:
        right = _implied(left)
    names: dict[str, Any] = {}
    rest: Labels = []
    for term, value in zip(left.split(","), values, strict=True):
        before, _, after = term.partition("...")
        spread = len(value.labels) - len(before) - len(after)
        rest = _broadcast(operation, rest, value.labels[len(before) : len(before) + spread])
        for label in value.labels:
            algebra.touch(label)
        axes = [*before, *([""] * spread), *after]
        _name_axes(operation, value, axes, names)
        for axis, letter in enumerate(axes):
            if letter and letter not in right:
                operation.contract(value, axis)
    operation.loop([*rest, *names.values()])
    before, _, after = right.partition("...")
    return [[*(names[c] for c in before), *(rest if "..." in right else []), *(names[c] for c in after)]]


def _implied(left: str) -> str:
    """Returns what an equation without an arrow makes: the letters that stand once, in alphabetical order."""
    letters = [letter for letter in left if letter.isalpha()]
    once = sorted(letter for letter in set(letters) if letters.count(letter) == 1)
    return ("..." if "..." in left else "") + "".join(once)


def _name_axes(operation: OperationView, value: Any, axes: list[str], names: dict[str, Any]) -> None:
    """Gives every letter of an operand the label that stands there; axes of one letter become one."""
    algebra = operation.algebra
    for axis, (letter, label) in enumerate(zip(axes, value.labels, strict=True)):
        if not letter:
            continue
        if axes.count(letter) > 1:
            algebra.pin(label, "a diagonal is taken")
        if letter not in names:
            names[letter] = label
        elif value.shape[axis] > 1:
            names[letter] = algebra.unify(names[letter], label)


def _broadcast(operation: OperationView, first: Labels, second: Labels) -> Labels:
    algebra = operation.algebra
    longer, shorter = (first, second) if len(first) >= len(second) else (second, first)
    common = list(longer)
    for place in range(-len(shorter), 0):
        sizes = algebra.size(common[place]), algebra.size(shorter[place])
        if sizes[0] == sizes[1]:
            common[place] = algebra.unify(common[place], shorter[place])
        elif sizes[0] == 1:
            common[place] = shorter[place]
    return common


def _tensordot(operation: OperationView) -> list[Labels]:
    first, second = operation.value("self"), operation.value("other")
    summed = list(zip(operation.axes("self", "dims_self"), operation.axes("other", "dims_other"), strict=True))
    ours = [chr(ord("a") + axis) for axis in range(len(first.shape))]
    theirs = [chr(ord("n") + axis) for axis in range(len(second.shape))]
    for our_axis, their_axis in summed:
        theirs[their_axis] = ours[our_axis]
    kept = [c for c in ours + theirs if (ours + theirs).count(c) == 1]
    return _contracted(operation, f"{''.join(ours)},{''.join(theirs)}->{''.join(kept)}", [first, second])


# What attention becomes in a program that was lowered further.
_KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "attention_math")

PRODUCTS: dict[str, NodeRule] = {
    "aten.scaled_dot_product_attention": FunctionRule(_attention),
    **{f"aten._scaled_dot_product_{kind}": FunctionRule(_attention) for kind in _KERNELS},
    "aten.einsum": FunctionRule(_einsum),
    "aten.tensordot": FunctionRule(_tensordot),
    "aten.baddbmm": EinRule("b m k; b k n; b m n -> b m n", ("batch1", "batch2", "self")),
    "aten.bilinear": EinRule("... i; ... j; o i j; o -> ... o", ("input1", "input2", "weight", "bias")),
    "aten.outer": EinRule("m; n -> m n", ("self", "vec2")),
    "aten.addmv": EinRule("m; m k; k -> m", ("self", "mat", "vec")),
}
