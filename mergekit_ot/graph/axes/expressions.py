"""Axis expressions: what one axis of one tensor is made of.

Neurons of one kind are an `Atom`, a set that a permutation may reorder. `Product` is a row-major index over several
factors (channel × pixels, head × dim), `Concat` puts blocks one after the other, and `Case` says "which of these
holds depends on the block of a `Concat` on another axis" (fused query/key/value, channel shuffle). An atom with a
*context* is a family: one independent order for every index of the context's atoms.

What holds for every expression that a function here returns:

- **Size.** Resolving, selecting and refining never change how many indices an axis has.
- **Normal form.** No factor of a product is a product or has size one and is constant; a product has two factors and a
  concatenation two blocks at least; the options of a case differ. So two axes that are the same compare equal.
- **Refinement.** An atom is *bound* once at most, to another atom (they were unified) or to what it was cut into, and
  never to an expression that holds it. Whoever holds the atom sees the pieces: labels are refined in place, in all
  tensors at once, and `resolve` reads what became of them.

Pictures of all this: ``docs/explanation/axis-algebra.md``. The specification is ``tests/graph/test_algebra.py``.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mergekit_ot.graph.axes.reasons import PinReason

_numbers = itertools.count()


class Atom:
    """A set of neurons with one order (or, with a context, one order per index of the context).

    What holds of it, before and after every operation of the algebra:

    - Its size never changes. An atom that is cut is bound to its pieces and leaves all tensors.
    - A pin stays, and a pinned atom has no context: what keeps its order keeps it at every index.
    - A context holds unbound atoms of more than one neuron, never the atom itself. It only ever shrinks, or follows its
      own atoms where they are refined: in place of an atom stand the pieces that it was cut into.
    - After `settle`, every atom of the context stands exactly once where this one stands, in every tensor (its own axis
      is looked at first): otherwise nobody could say which index is meant, and the family is tied across it.

    Attributes:
        size: Number of neurons.
        context: The atoms by which a family is indexed; empty for a plain set.
        pin: Why nothing may reorder it, or None.
        flags: What `AxisAlgebra.flag` said about its neurons.
        link: What it is bound to; None while it stands for itself.
        number: Age; where two atoms are unified the older one stands for both.

    Example:
        >>> from mergekit_ot.graph.axes.algebra import AxisAlgebra
        >>> algebra = AxisAlgebra()
        >>> first, second = algebra.atom(4), algebra.atom(4)
        >>> algebra.unify(first, second) is first, resolve(second) is first
        (True, True)
    """

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
    """The identity of a `Concat`, to which a `Case` on another axis refers.

    Concatenations with the same root tag have the same number of blocks and mean the same ones, block by block, though
    on different axes the blocks may differ in size (heads on one axis, their dimensions on another). Where two
    concatenations are unified block by block their tags are linked; where blocks are joined or cut anew the result gets
    a tag of its own, and a `Selection` says what that means for the cases that looked at the old one.
    """

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
    """An axis along which the tensor is constant; it fits anything and constrains nothing.

    Example:
        >>> from mergekit_ot.graph.axes.algebra import AxisAlgebra
        >>> neurons = Atom(4)
        >>> AxisAlgebra().unify(Replicated(4), neurons) is neurons
        True
    """

    size: int


@dataclass(frozen=True)
class Product:
    """A row-major index over factors, outermost first."""

    factors: tuple[Expression, ...]


@dataclass(frozen=True)
class Concat:
    """Blocks that keep their places; neurons move inside a block only."""

    tag: Tag
    blocks: tuple[Expression, ...]


@dataclass(frozen=True)
class Case:
    """One option per block of the `Concat` with the same tag, which stands on another axis (or further out).

    There are as many options as blocks, all of one size. They differ, for a case whose options agree is that option;
    and none of them holds a case over the same tag, for inside option ``i`` the block is known to be ``i``. After
    `settle` the concatenation stands exactly once where the case stands; otherwise the case is *collapsed*: its options
    are unified, so that nothing depends on the block any more.

    Example:
        >>> tag, first, second = Tag(), Atom(4), Atom(4)
        >>> isinstance(case(tag, [first, second]), Case), case(tag, [first, first]) is first
        (True, True)
    """

    tag: Tag
    options: tuple[Expression, ...]


Expression = Atom | Replicated | Product | Concat | Case

# Which options survive when a Concat is cut: tag → (tag of what is left, or None for one block; (block, inner cut)…).
Selection = Mapping[Tag, tuple["Tag | None", tuple[tuple[int, "Selection"], ...]]]


def at_one(tag: Tag, block: int) -> Selection:
    """Returns the selection of one block of a concatenation."""
    return {tag: (None, ((block, {}),))}


def pieces(expression: Expression) -> tuple[Expression, ...]:
    """Returns the factors of a product, the blocks of a concatenation, the options of a case; of others, nothing."""
    if isinstance(expression, Product):
        return expression.factors
    if isinstance(expression, Concat):
        return expression.blocks
    return expression.options if isinstance(expression, Case) else ()


def size_of(expression: Expression) -> int:
    """Returns the number of indices along the axis."""
    if isinstance(expression, Atom | Replicated):
        return expression.size
    if isinstance(expression, Product):
        return math.prod(map(size_of, expression.factors))
    if isinstance(expression, Concat):
        return sum(map(size_of, expression.blocks))
    return size_of(expression.options[0])


def resolve(expression: Expression) -> Expression:
    """Returns the expression with every bound atom replaced by what it is bound to, in normal form.

    Before and after: nothing is bound, pinned or tied by looking. Links are shortened on the way.
    """
    if isinstance(expression, Atom):
        if expression.link is None:
            return expression
        expression.link = resolve(expression.link)
        return expression.link
    if isinstance(expression, Product):
        return product(expression.factors)
    if isinstance(expression, Concat):
        blocks = tuple(resolve(block) for block in expression.blocks)
        return blocks[0] if len(blocks) == 1 else Concat(expression.tag.root(), blocks)
    if isinstance(expression, Case):
        return case(expression.tag, expression.options)
    return expression


def product(factors: Sequence[Expression]) -> Expression:
    """Returns the product of `factors` in normal form: flattened, without constant factors of one.

    A product of nothing is constant of size one, a product of one factor is that factor, and constant where all are.
    """
    flat: list[Expression] = []
    for factor in factors:
        resolved = resolve(factor)
        if isinstance(resolved, Product):
            flat.extend(resolved.factors)
        elif not (isinstance(resolved, Replicated) and resolved.size == 1):
            flat.append(resolved)
    if not flat:
        return Replicated(1)
    if all(isinstance(factor, Replicated) for factor in flat):
        return Replicated(math.prod(map(size_of, flat)))
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def case(tag: Tag, options: Sequence[Expression]) -> Expression:
    """Returns the case over `tag` in normal form; a case whose options agree is that option."""
    root = tag.root()
    resolved = tuple(select(option, at_one(root, block)) for block, option in enumerate(options))
    return resolved[0] if all(option == resolved[0] for option in resolved) else Case(root, resolved)


def select(expression: Expression, selection: Selection) -> Expression:
    """Returns `expression` after the blocks named by `selection` were cut out of the axis that its cases look at.

    Before: the cases look at the concatenation as it was. After: at what is left of it; where one block is left, the
    case is the option of that block.
    """
    expression = resolve(expression)
    if not selection or isinstance(expression, Atom | Replicated):
        return expression
    if isinstance(expression, Case):
        return _select_case(expression, selection)
    selected = tuple(select(piece, selection) for piece in pieces(expression))
    return product(selected) if isinstance(expression, Product) else Concat(expression.tag, selected)


def _select_case(expression: Case, selection: Selection) -> Expression:
    cut = selection.get(expression.tag)
    if cut is None:
        return case(expression.tag, [select(option, selection) for option in expression.options])
    tag, blocks = cut
    outer = {key: value for key, value in selection.items() if key is not expression.tag}
    kept = [select(expression.options[block], {**outer, **inner}) for block, inner in blocks]
    return kept[0] if tag is None else case(tag, kept)


def atoms_of(expression: Expression) -> set[Atom]:
    """Returns the unbound atoms of an expression, those under a `Case` included."""
    return set(_leaves(resolve(expression)))


def _leaves(expression: Expression) -> Iterator[Atom]:
    if isinstance(expression, Atom):
        yield expression
    for piece in pieces(expression):
        yield from _leaves(piece)


def standing_for(expressions: Iterable[Expression]) -> set[Atom]:
    """Returns the unbound atoms of several expressions, such as those that stand today for atoms noted earlier."""
    return set(itertools.chain.from_iterable(map(atoms_of, expressions)))


def movable(expression: Expression) -> set[Atom]:
    """Returns the atoms of an expression that have more than one neuron and no pin."""
    return {atom for atom in atoms_of(expression) if atom.pin is None and atom.size > 1}


def is_fixed(expression: Expression) -> bool:
    """Whether neurons stand on the axis and none of them may move."""
    atoms = atoms_of(expression)
    return bool(atoms) and all(atom.pin is not None for atom in atoms)


def pin_of(expression: Expression) -> PinReason:
    """Returns why the first neurons of an axis stay in place; one that nothing holds says so."""
    pins = (atom.pin for atom in atoms_of(expression))
    return next((pin for pin in pins if pin is not None), PinReason("nothing stands there"))


def is_inert(expression: Expression) -> bool:
    """Whether nothing on the axis may move: every neuron is pinned, or the tensor is constant along it."""
    return all(atom.pin is not None for atom in atoms_of(expression))


def is_constant_somewhere(expression: Expression) -> bool:
    """Whether the tensor is constant along a stretch of the axis of more than one index."""
    if isinstance(expression, Replicated):
        return expression.size > 1
    return any(is_constant_somewhere(piece) for piece in pieces(expression))
