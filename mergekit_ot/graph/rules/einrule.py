"""Carries out an `EinRule`: matches its tokens with the labels of an operation."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mergekit_ot.graph.axes.expressions import Expression, Replicated, product, size_of
from mergekit_ot.graph.axes.unification import BLOCKS_DIFFER
from mergekit_ot.graph.rules.rule import Labels, NodeRule, OperationView, RuleError, Value

_RESTS = ("...", "*", "*!", "*~")


def label_by_pattern(rule: EinRule, operation: OperationView) -> list[Labels]:
    """Returns the labels of each output of `operation` as `rule` says.

    Raises:
        RuleError: An operand does not have the rank or the sizes of the pattern.
    """
    names: dict[str, Expression] = {}
    rests: dict[str, Labels] = {}
    kept = _all_names(itertools.chain(*rule.outputs))
    for argument, tokens in zip(rule.arguments, rule.operands, strict=True):
        value = operation.arguments.get(argument)
        if value is None:
            continue
        if not isinstance(value, Value):
            raise RuleError(f"argument '{argument}' of {operation.name} is not a tensor")
        _match(rule, operation, argument, value, tokens, names, rests, kept)
    for name, flag in rule.flags.items():
        if name in names:
            operation.algebra.flag(names[name], flag)
    operation.loop(_loop(rule, names, rests))
    outputs = []
    for tokens, shape in zip(rule.outputs, operation.output_shapes, strict=False):
        outputs.append(_emit(operation, tokens, shape, names, rests))
    # Statistics that an operation returns beside its result (and that are empty at evaluation) come after the pattern.
    for shape in operation.output_shapes[len(rule.outputs) :]:
        outputs.append([operation.algebra.pinned(size, "further output of the operation") for size in shape])
    return outputs


def _loop(rule: EinRule, names: dict[str, Expression], rests: dict[str, Labels]) -> Labels:
    """Returns every axis that the operation runs over once; those that are mixed along no family may depend on."""
    tokens = list(itertools.chain(*rule.operands))
    blind = _all_names(token for token in tokens if token.startswith("~"))
    spread = [labels for key, labels in rests.items() if key == "..." or "*~" not in tokens]
    return [*itertools.chain(*spread), *(label for name, label in names.items() if name not in blind)]


def _match(
    rule: EinRule,
    operation: OperationView,
    argument: str,
    value: Value,
    tokens: tuple[str, ...],
    names: dict[str, Expression],
    rests: dict[str, Labels],
    kept: set[str],
) -> None:
    fixed = sum(token not in _RESTS for token in tokens)
    spare = len(value.labels) - fixed
    if spare < 0 or (spare > 0 and fixed == len(tokens)):
        raise RuleError(f"'{argument}' of {operation.name} has {len(value.labels)} axes, the rule expects {tokens}")
    axis = 0
    mixed: list[int] = []
    for token in tokens:
        if token in _RESTS:
            _match_rest(operation, token, value.labels[axis : axis + spare], rests)
            mixed += range(axis, axis + spare) if token == "*~" else ()
            axis += spare
            continue
        if token.startswith("~"):
            mixed.append(axis)
        _match_axis(rule, operation, argument, axis, token, names, kept)
        axis += 1
    if mixed:
        operation.mix(argument, mixed)


def _match_rest(operation: OperationView, token: str, labels: Labels, rests: dict[str, Labels]) -> None:
    algebra = operation.algebra
    key = "..." if token == "..." else "*"
    if token == "*!":
        for label in labels:
            algebra.pin(label, "position in space, time or a kernel")
        return
    if key in rests:
        count = min(len(labels), len(rests[key]))
        for ours, theirs in zip(rests[key][-count:] if count else [], labels[-count:] if count else [], strict=True):
            algebra.unify(ours, theirs)
    else:
        rests[key] = list(labels)


def _match_axis(
    rule: EinRule,
    operation: OperationView,
    argument: str,
    axis: int,
    token: str,
    names: dict[str, Expression],
    kept: set[str],
) -> None:
    algebra = operation.algebra
    value = operation.value(argument)
    label = value.labels[axis]
    if token.endswith("!"):
        algebra.pin(label, "position in space, time or a kernel")
        names.setdefault(token[:-1], label)
        return
    inside = _names(token)
    factors: list[Expression] | None = [label]
    if len(inside) > 1:
        sizes = _sizes(rule, operation, inside, label)
        factors = algebra.split_product(label, sizes)
        if factors is None:
            algebra.pin(label, BLOCKS_DIFFER)
            factors = [Replicated(1) if size == 1 else algebra.pinned(size, BLOCKS_DIFFER) for size in sizes]
    algebra.touch(label)
    for name, factor in zip(inside, factors, strict=True):
        if name in names and not (isinstance(factor, Replicated) and factor.size == 1):
            names[name] = algebra.unify(names[name], factor)
        else:
            names.setdefault(name, factor)
        if name not in kept:
            operation.contract(argument, axis, factor)


def _sizes(rule: EinRule, operation: OperationView, inside: list[str], label: Expression) -> list[int]:
    total = size_of(label)
    sizes: list[int | None] = []
    for name in inside:
        if name in rule.sizes:
            sizes.append(int(operation.argument(rule.sizes[name], 1)))
        else:
            sizes.append(None)
    known = math.prod(size for size in sizes if size is not None)
    unknown = sizes.count(None)
    if unknown > 1 or known == 0 or total % known:
        raise RuleError(f"an axis of {total} does not divide by {known}")
    return [total // known if size is None else size for size in sizes]


def _emit(
    operation: OperationView,
    tokens: tuple[str, ...],
    shape: tuple[int, ...],
    names: dict[str, Expression],
    rests: dict[str, Labels],
) -> Labels:
    labels: Labels = []
    for token in tokens:
        if token in ("...", "*", "*~"):
            labels.extend(rests.get("..." if token == "..." else "*", []))
        elif token == "*!":
            rest = len(shape) - len(labels)
            labels.extend(operation.algebra.pinned(size, "position in space or time") for size in shape[-rest:])
        elif token.endswith("!") and token[:-1] not in names:
            labels.append(operation.algebra.pinned(shape[len(labels)], "made by the operation in a fixed order"))
        else:
            labels.append(product([names.get(name, Replicated(1)) for name in _names(token)]))
    return labels


def _all_names(tokens: Iterable[str]) -> set[str]:
    return set(itertools.chain.from_iterable(map(_names, tokens)))


def _names(token: str) -> list[str]:
    if token in _RESTS:
        return []
    return [name.strip("~!") for name in token.strip("()").split()]


@dataclass(frozen=True)
class EinRule(NodeRule):
    """A rule in one line: ``"... i; o i; o -> ... o"`` for a linear map.

    Operands are separated by ``;`` and named by `arguments`; every axis is accounted for. ``x`` an axis, ``x!`` a
    pinned one, ``~x`` one that is mixed along, ``(g o)`` a row-major product, ``...`` leading axes, ``*`` further
    axes that pass, ``*!`` that are pinned, ``*~`` that are mixed along; in an output, a capital ``H!`` is a new
    pinned axis. A name that no output has is summed over.

    Attributes:
        pattern: The line.
        arguments: Schema names of the operands, in order; absent optional ones are skipped.
        sizes: Name in the pattern → argument that holds its size (``{"g": "groups"}``).
        flags: Name in the pattern → flag of its neuron group.

    Raises:
        RuleError: The line is no pattern, or has another number of operands than `arguments`.

    Example:
        >>> EinRule("... i; o i; o -> ... o", ("input", "weight", "bias")).operands
        (('...', 'i'), ('o', 'i'), ('o',))
    """

    pattern: str
    arguments: tuple[str, ...] = ("input",)
    sizes: Mapping[str, str] = field(default_factory=dict)
    flags: Mapping[str, str] = field(default_factory=dict)
    is_movement: bool = False
    state: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        why = _what_is_wrong(self)
        if why:
            raise RuleError(f"The pattern '{self.pattern}' is no rule: {why}. Write it as '... i; o i; o -> ... o'.")

    @property
    def operands(self) -> tuple[tuple[str, ...], ...]:
        """The axis tokens of every operand."""
        return _tokens(self.pattern.split("->")[0])

    @property
    def outputs(self) -> tuple[tuple[str, ...], ...]:
        """The axis tokens of every output."""
        return _tokens(self.pattern.split("->")[1])

    def label(self, operation: OperationView) -> list[Labels]:
        """Returns the labels of each output, after unifying and pinning what the line says."""
        return label_by_pattern(self, operation)


# An axis, pinned or mixed along; a product of axes; further axes. What is left of a side without these is wrong.
_AXIS = r"~?\w+!?"
_TOKEN = re.compile(rf"(?<!\S)(\.\.\.|\*[!~]?|{_AXIS}|\(\s*{_AXIS}(\s+{_AXIS})*\s*\))(?!\S)")


def _what_is_wrong(rule: EinRule) -> str | None:
    operands, arrow, outputs = rule.pattern.partition("->")
    if not arrow or "->" in outputs:
        return "it needs one '->' between operands and outputs"
    left = _TOKEN.sub(" ", f"{operands};{outputs}".replace(";", " ")).split()
    if left:
        return f"'{left[0]}' is no axis"
    if any(sum(token in _RESTS for token in tokens) > 1 for tokens in rule.operands):
        return "an operand has further axes in two places"
    if len(rule.operands) != len(rule.arguments):
        return f"it has {len(rule.operands)} operands, and {len(rule.arguments)} arguments are named"
    return None


def _tokens(side: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(re.findall(r"\([^)]*\)|[^\s()]+", operand)) for operand in side.split(";"))
