"""Axis expressions: what one axis of one tensor is made of.

Neurons of one kind are an `Atom`, a set that a permutation may reorder. `Product` is a row-major index over several
factors (channel × pixels, head × dim), `Concat` puts blocks one after the other, and `Case` says "which of these
holds depends on the block of a `Concat` on another axis" (fused query/key/value, channel shuffle). An atom with a
*context* is a family: one independent order for every index of the context's atoms.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

_numbers = itertools.count()


@dataclass(frozen=True)
class PinReason:
    """Why an axis may not be reordered: a sentence, and the operation, module path and source line behind it."""

    why: str
    operation: str = ""
    module_path: str = ""
    source: str = ""

    def __str__(self) -> str:
        place = f" at '{self.module_path}'" if self.module_path else ""
        operation = f" [{self.operation}{place}]" if self.operation else place
        return f"{self.why}{operation}" + (f" ({self.source})" if self.source else "")


class Atom:
    """A set of neurons with one order (or, with a context, one order per index of the context)."""

    __slots__ = ("context", "flags", "link", "number", "pin", "size")

    def __init__(self, size: int, context: set[Atom] | None = None, pin: PinReason | None = None) -> None:
        self.size = size
        self.context: set[Atom] = set() if pin else set(context or ())
        self.pin = pin
        self.flags: set[str] = set()
        self.link: Expression | None = None
        self.number = next(_numbers)

    def __repr__(self) -> str:
        indexed = "[" + ",".join(f"a{c.number}" for c in sorted(self.context, key=lambda c: c.number)) + "]"
        return f"a{self.number}:{self.size}{indexed if self.context else ''}{'!' if self.pin else ''}"


class Tag:
    """The identity of a `Concat`, to which a `Case` on another axis refers."""

    __slots__ = ("link", "number")

    def __init__(self) -> None:
        self.link: Tag | None = None
        self.number = next(_numbers)

    def root(self) -> Tag:
        """Returns the tag that stands for this one after unification."""
        tag = self
        while tag.link is not None:
            tag = tag.link
        return tag


@dataclass(frozen=True)
class Replicated:
    """An axis along which the tensor is constant; it fits anything and constrains nothing."""

    size: int


@dataclass(frozen=True)
class Product:
    """A row-major index over factors, outermost first."""

    parts: tuple[Expression, ...]


@dataclass(frozen=True)
class Concat:
    """Blocks that keep their places; neurons move inside a block only."""

    tag: Tag
    parts: tuple[Expression, ...]


@dataclass(frozen=True)
class Case:
    """One option per block of the `Concat` with the same tag, which stands on another axis (or further out)."""

    tag: Tag
    options: tuple[Expression, ...]


Expression = Atom | Replicated | Product | Concat | Case

# Which options survive when a Concat is cut: tag → (tag of what is left, or None for one block; (block, inner cut)…).
Selection = Mapping[Tag, tuple["Tag | None", tuple[tuple[int, "Selection"], ...]]]


def size_of(expression: Expression) -> int:
    """Returns the number of indices along the axis."""
    if isinstance(expression, Atom | Replicated):
        return expression.size
    if isinstance(expression, Product):
        total = 1
        for part in expression.parts:
            total *= size_of(part)
        return total
    if isinstance(expression, Concat):
        return sum(size_of(part) for part in expression.parts)
    return size_of(expression.options[0])


def resolve(expression: Expression) -> Expression:
    """Returns the expression with every bound atom replaced by what it is bound to, in normal form."""
    if isinstance(expression, Atom):
        if expression.link is None:
            return expression
        expression.link = resolve(expression.link)
        return expression.link
    if isinstance(expression, Product):
        return product(expression.parts)
    if isinstance(expression, Concat):
        parts = tuple(resolve(part) for part in expression.parts)
        return parts[0] if len(parts) == 1 else Concat(expression.tag.root(), parts)
    if isinstance(expression, Case):
        return case(expression.tag, expression.options)
    return expression


def product(parts: tuple[Expression, ...] | list[Expression]) -> Expression:
    """Returns the product of `parts`, flattened; a product of one is that one."""
    flat: list[Expression] = []
    for part in parts:
        resolved = resolve(part)
        if isinstance(resolved, Product):
            flat.extend(resolved.parts)
        elif not (isinstance(resolved, Replicated) and resolved.size == 1):
            flat.append(resolved)
    if not flat:
        return Replicated(1)
    if all(isinstance(part, Replicated) for part in flat):
        return Replicated(size_of(Product(tuple(flat))))
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def case(tag: Tag, options: tuple[Expression, ...] | list[Expression]) -> Expression:
    """Returns the case over `tag`; a case whose options agree is that option."""
    root = tag.root()
    resolved = tuple(select(resolve(o), {root: (None, ((i, {}),))}) for i, o in enumerate(options))
    return resolved[0] if all(o == resolved[0] for o in resolved) else Case(root, resolved)


def select(expression: Expression, selection: Selection) -> Expression:
    """Returns `expression` after the blocks named by `selection` were cut out of the axis that its cases look at."""
    expression = resolve(expression)
    if not selection or isinstance(expression, Atom | Replicated):
        return expression
    if isinstance(expression, Product):
        return product([select(part, selection) for part in expression.parts])
    if isinstance(expression, Concat):
        return Concat(expression.tag, tuple(select(part, selection) for part in expression.parts))
    cut = selection.get(expression.tag)
    if cut is None:
        return case(expression.tag, tuple(select(option, selection) for option in expression.options))
    tag, blocks = cut
    outer = {key: value for key, value in selection.items() if key is not expression.tag}
    kept = [select(expression.options[block], {**outer, **inner}) for block, inner in blocks]
    return kept[0] if tag is None else case(tag, kept)


def atoms_of(expression: Expression) -> set[Atom]:
    """Returns the unbound atoms of an expression, those under a `Case` included."""
    return {occurrence.atom for occurrence in occurrences((expression,)) if occurrence.atom is not None}


def is_fixed(expression: Expression) -> bool:
    """Whether neurons stand on the axis and none of them may move."""
    atoms = atoms_of(expression)
    return bool(atoms) and all(atom.pin is not None for atom in atoms)


def is_inert(expression: Expression) -> bool:
    """Whether nothing on the axis may move: every neuron is pinned, or the tensor is constant along it."""
    return all(atom.pin is not None for atom in atoms_of(expression))


@dataclass(frozen=True)
class Occurrence:
    """A place where an atom, the `Concat` of a tag, or a `Case` stands in the labels of a tensor."""

    axis: int
    guards: tuple[tuple[Tag, int], ...]
    atom: Atom | None = None
    concat: Tag | None = None
    case: Case | None = None

    def is_seen_from(self, other: Occurrence) -> bool | None:
        """Returns whether this exists wherever `other` does; None where the two never exist together."""
        mine, theirs = dict(self.guards), dict(other.guards)
        if any(tag in theirs and theirs[tag] != block for tag, block in mine.items()):
            return None
        return all(tag in theirs for tag in mine)


def occurrences(labels: tuple[Expression, ...] | list[Expression]) -> list[Occurrence]:
    """Returns every place of every atom, concatenation and case in the labels of one tensor."""
    found: list[Occurrence] = []
    for axis, label in enumerate(labels):
        found.extend(_walk(resolve(label), axis, ()))
    return found


def _walk(expression: Expression, axis: int, guards: tuple[tuple[Tag, int], ...]) -> Iterator[Occurrence]:
    if isinstance(expression, Atom):
        yield Occurrence(axis, guards, atom=expression)
    elif isinstance(expression, Product):
        for part in expression.parts:
            yield from _walk(part, axis, guards)
    elif isinstance(expression, Concat):
        yield Occurrence(axis, guards, concat=expression.tag)
        for block, part in enumerate(expression.parts):
            yield from _walk(part, axis, (*guards, (expression.tag, block)))
    elif isinstance(expression, Case):
        yield Occurrence(axis, guards, case=expression)
        for block, option in enumerate(expression.options):
            yield from _walk(option, axis, (*guards, (expression.tag, block)))
