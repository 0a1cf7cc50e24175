"""Unification of axis expressions: two axes become one, refined where needed, pinned where nothing fits.

Every call only ever removes freedom, and removes enough: a free family falls back to a tied one, a tied one to a pin.
So a wrong or missing rule can cost neurons their freedom, never a model its function.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from mergekit_ot.graph.axes.expressions import (
    Atom,
    Case,
    Concat,
    Expression,
    Product,
    Replicated,
    Tag,
    atoms_of,
    case,
    is_constant_somewhere,
    is_fixed,
    is_inert,
    pieces,
    pin_of,
    product,
    resolve,
    size_of,
)
from mergekit_ot.graph.axes.occurrences import occurrences
from mergekit_ot.graph.axes.splitting import split_concat, split_product
from mergekit_ot.graph.axes.union_find import UnionFind

BLOCKS_DIFFER = "two block structures meet that have no common refinement"


def unify(atoms: UnionFind, first: Expression, second: Expression) -> Expression:
    """Demands that both axes are always reordered alike; returns the common expression.

    After: both resolve to one expression, or to expressions that are pinned, or one is constant along the axis, which
    fits any order of the other. Contexts are narrowed later, by `settle`.
    """
    first, second = resolve(first), resolve(second)
    atoms.touch(first)
    atoms.touch(second)
    if first == second:
        return first
    if isinstance(first, Replicated) or isinstance(second, Replicated):
        return second if isinstance(first, Replicated) else first
    if size_of(first) == size_of(second) and _is_settled(first, second):
        varying = (side for side in (first, second) if not is_constant_somewhere(side))
        return next(varying, None) or atoms.pinned(size_of(first), "both stay in place")
    met = _meet(atoms, first, second)
    return _common(atoms, resolve(first), resolve(second), met)


def _meet(atoms: UnionFind, first: Expression, second: Expression) -> list[Expression] | None:
    """Unifies two axes piece by piece; returns what the pieces became, None where there are none."""
    if size_of(first) != size_of(second):
        return _give_up(atoms, first, second, f"axes of {size_of(first)} and {size_of(second)} neurons meet")
    if isinstance(first, Case) or isinstance(second, Case):
        return _unify_case(atoms, first, second)
    if isinstance(first, Atom):
        return _unify_atom(atoms, first, second)
    if isinstance(second, Atom):
        return _unify_atom(atoms, second, first)
    if isinstance(first, Product) and isinstance(second, Product):
        return _unify_products(atoms, first, second)
    return _unify_blocks(atoms, first, second)


def _unify_columns(atoms: UnionFind, first: Sequence[Expression], second: Sequence[Expression]) -> list[Expression]:
    return [unify(atoms, ours, theirs) for ours, theirs in zip(first, second, strict=True)]


def _common(atoms: UnionFind, first: Expression, second: Expression, met: list[Expression] | None) -> Expression:
    """Returns the side that varies; where both are constant in places, what the pieces became."""
    for side in (first, second):
        if not is_constant_somewhere(side):
            return side
    if met is None:
        # Nothing says any more along which factors it would be constant.
        return _pinned_if_constant(atoms, first)
    if isinstance(first, Product) and isinstance(second, Product):
        return product(met)
    if isinstance(first, Case) and isinstance(second, Case):
        return case(first.tag, met)
    if isinstance(first, Concat) and [*map(size_of, first.blocks)] == [*map(size_of, met)]:
        return resolve(Concat(first.tag, tuple(met)))
    return resolve(Concat(Tag(), tuple(met)))


def _give_up(atoms: UnionFind, first: Expression, second: Expression, why: str = BLOCKS_DIFFER) -> None:
    atoms.pin(first, why)
    atoms.pin(second, why)


def _unify_atom(atoms: UnionFind, atom: Atom, other: Expression) -> None:
    """Binds an atom to what it meets: to another atom, or to a composite that describes it more finely."""
    if isinstance(other, Atom):
        return atoms.join(atom, other)
    if isinstance(other, Concat) and is_fixed(other) and not is_constant_somewhere(other):
        # Its blocks do not matter to an axis that cannot move at all.
        return atoms.pin_atom(atom, pin_of(other))
    other = _self_contained(atoms, _refreshed(atoms, other, atom))
    inside = atoms_of(other)
    if atom in inside or any(atom in inner.context for inner in inside):
        return _give_up(atoms, atom, other)
    atoms.hand_on(atom, inside)
    return atoms.bind(atom, other)


def _refreshed(
    atoms: UnionFind, expression: Expression, like: Atom, outer: frozenset[Atom] = frozenset()
) -> Expression:
    """Returns `expression` with constant stretches replaced by free atoms: it now describes data that vary.

    Beside other factors a new one is a family over them (query heads that share a key head).
    """
    if isinstance(expression, Replicated) and expression.size > 1:
        return atoms.atom(expression.size, like, context=like.context | outer)
    if isinstance(expression, Product):
        factors: list[Expression] = []
        for place, factor in enumerate(expression.factors):
            beside: set[Atom] = set()
            for other in (*factors, *expression.factors[place + 1 :]):
                beside |= {atom for atom in atoms_of(other) if atom.size > 1}
            factors.append(_refreshed(atoms, factor, like, outer | beside))
        return product(factors)
    inner = [_refreshed(atoms, piece, like, outer) for piece in pieces(expression)]
    if isinstance(expression, Concat):
        return Concat(expression.tag, tuple(inner))
    return case(expression.tag, inner) if isinstance(expression, Case) else expression


def _self_contained(atoms: UnionFind, expression: Expression) -> Expression:
    """Ties cases whose concatenation lies on another axis: a bound atom travels without that axis."""
    while True:
        places = occurrences((expression,))
        tags = {place.concat for place in places if place.concat is not None}
        cases = [place.case for place in places if place.case is not None and place.case.tag not in tags]
        # One that is pinned as a whole needs no block to look at, and its options may differ in their blocks.
        loose = next((case for case in cases if not is_inert(case)), None)
        if loose is None:
            return resolve(expression)
        collapse(atoms, loose)
        expression = resolve(expression)


def collapse(atoms: UnionFind, expression: Case) -> None:
    """Ties the options of a case; afterwards it no longer depends on another axis."""
    first = expression.options[0]
    for option in expression.options[1:]:
        unify(atoms, first, option)
    left = resolve(expression)
    if isinstance(left, Case):
        atoms.pin(left, BLOCKS_DIFFER)


def _unify_case(atoms: UnionFind, first: Expression, second: Expression) -> list[Expression] | None:
    """Unifies option by option where both look at the same blocks; otherwise what is a case is tied first."""
    if isinstance(first, Case) and isinstance(second, Case) and first.tag is second.tag:
        return _unify_columns(atoms, first.options, second.options)
    for side in (first, second):
        side = resolve(side)
        if isinstance(side, Case):
            collapse(atoms, side)
    first, second = resolve(first), resolve(second)
    if not isinstance(first, Case) and not isinstance(second, Case):
        return [unify(atoms, first, second)]
    return _give_up(atoms, first, second)


def _unify_products(atoms: UnionFind, first: Product, second: Product) -> list[Expression] | None:
    """Unifies factor by factor from the outside; the larger of two factors is cut where the smaller one ends."""
    common: list[Expression] = []
    ours, theirs = list(first.factors), list(second.factors)
    while ours and theirs:
        mine, other = resolve(ours.pop(0)), resolve(theirs.pop(0))
        have, want = size_of(mine), size_of(other)
        if have == want:
            common.append(unify(atoms, mine, other))
            continue
        small, large, queue = (mine, other, theirs) if have < want else (other, mine, ours)
        if size_of(small) == 1:
            # A factor of one neuron has no partner: the other one waits for the next.
            queue.insert(0, large)
            continue
        cut = _cut_at(atoms, large, size_of(small))
        if cut is None:
            return _give_up(atoms, first, second)
        common.append(unify(atoms, small, cut[0]))
        queue.insert(0, cut[1])
    return common


def _cut_at(atoms: UnionFind, expression: Expression, size: int) -> list[Expression] | None:
    """Returns an axis as an outer factor of `size` and an inner one, None where it does not divide."""
    count, rest = divmod(size_of(expression), size)
    return None if rest else split_product(atoms, expression, [size, count])


def _unify_blocks(atoms: UnionFind, first: Expression, second: Expression) -> list[Expression] | None:
    """Unifies two composites of which at least one is a concatenation."""
    if isinstance(first, Concat) and isinstance(second, Concat) and _block_ends(first) == _block_ends(second):
        tag, other = first.tag.root(), second.tag.root()
        if tag is not other:
            other.link = tag
        return _unify_columns(atoms, first.blocks, second.blocks)
    sizes = _common_blocks(first, second)
    ours, theirs = split_concat(atoms, first, sizes), split_concat(atoms, second, sizes)
    if ours is not None and theirs is not None:
        return _unify_columns(atoms, [block for block, _ in ours], [block for block, _ in theirs])
    return _unify_rows(atoms, first, second)


def _unify_rows(atoms: UnionFind, first: Expression, second: Expression) -> list[Expression] | None:
    """Unifies a product with a concatenation factor by factor, where the blocks are rows of the product."""
    factors = first if isinstance(first, Product) else second
    sizes = [size for size in map(size_of, pieces(factors)) if size > 1]
    if not isinstance(factors, Product) or len(sizes) < 2:
        return _give_up(atoms, first, second)  # nothing would become smaller
    ours, theirs = split_product(atoms, first, sizes), split_product(atoms, second, sizes)
    if ours is None or theirs is None:
        return _give_up(atoms, first, second)
    # The factors are tied, but a product of them is no list of blocks: what is constant stays with `first`.
    _unify_columns(atoms, ours, theirs)
    return [_pinned_if_constant(atoms, first)]


def _common_blocks(first: Expression, second: Expression) -> list[int]:
    """Returns the sizes of the blocks between all places where one of the two is cut."""
    if isinstance(first, Concat) and isinstance(second, Concat):
        ends = sorted({*_block_ends(first), *_block_ends(second)})
        return [end - start for start, end in itertools.pairwise([0, *ends])]
    return [size_of(block) for block in pieces(first if isinstance(first, Concat) else second)]


def _pinned_if_constant(atoms: UnionFind, expression: Expression) -> Expression:
    if is_constant_somewhere(expression):
        atoms.pin(expression, BLOCKS_DIFFER)
        return atoms.pinned(size_of(expression), BLOCKS_DIFFER)
    return expression


def _is_settled(first: Expression, second: Expression) -> bool:
    """Whether two block structures have nothing that could move, so that there is nothing left to unify.

    Concatenations with the same blocks are excepted: their tags must meet, for the cases on other axes.
    """
    if not isinstance(first, Concat | Case) and not isinstance(second, Concat | Case):
        return False
    if isinstance(first, Concat) and isinstance(second, Concat) and _block_ends(first) == _block_ends(second):
        return False
    return all(is_fixed(side) for side in (first, second))


def _block_ends(expression: Concat) -> list[int]:
    return list(itertools.accumulate(size_of(block) for block in expression.blocks))
