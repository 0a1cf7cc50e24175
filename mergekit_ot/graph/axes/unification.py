"""Unification of axis expressions: union-find with refinement, and pins where nothing fits."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_ot.graph.axes.expressions import (
    Atom,
    Case,
    Concat,
    Expression,
    PinReason,
    Product,
    Replicated,
    Tag,
    atoms_of,
    case,
    is_fixed,
    is_inert,
    occurrences,
    product,
    resolve,
    size_of,
)
from mergekit_ot.graph.axes.splitting import Splitter

BLOCKS_DIFFER = "two block structures meet that have no common refinement"


class Unifier(Splitter):
    """Union-find over atoms, with binding to composites, refinement and a context per atom.

    Every call only ever removes freedom, and removes enough: a free family falls back to a tied one, a tied one to
    a pin. So a wrong or missing rule can cost neurons their freedom, never a model its function.
    """

    def __init__(self) -> None:
        super().__init__()
        self.touched: set[Atom] = set()
        self.reason = PinReason("not traced")
        self._pending: list[tuple[Expression, set[Atom]]] = []

    def touch(self, expression: Expression) -> None:
        """Marks the atoms of `expression` as accounted for by the running rule."""
        self.touched |= atoms_of(expression)

    def pin(self, expression: Expression, why: str) -> None:
        """Fixes every atom of `expression` at the identity."""
        reason = PinReason(why, self.reason.operation, self.reason.module_path, self.reason.source)
        for atom in atoms_of(expression):
            self._pin_atom(atom, reason)
        self.touch(expression)

    def pinned(self, size: int, why: str) -> Atom:
        """Returns a new axis that nothing may reorder."""
        reason = PinReason(why, self.reason.operation, self.reason.module_path, self.reason.source)
        return Atom(size, pin=reason)

    def _pin_atom(self, atom: Atom, reason: PinReason) -> None:
        atom.pin = atom.pin or reason
        atom.context = set()

    def unify(self, first: Expression, second: Expression) -> Expression:
        """Demands that both axes are always reordered alike; returns the common expression."""
        first, second = resolve(first), resolve(second)
        self.touch(first)
        self.touch(second)
        if first == second:
            return first
        if isinstance(first, Replicated) or isinstance(second, Replicated):
            return second if isinstance(first, Replicated) else first
        pieces: list[Expression] | None = None
        if size_of(first) != size_of(second):
            self._give_up(first, second, f"axes of {size_of(first)} and {size_of(second)} neurons meet")
        elif _is_settled(first, second):
            varying = (side for side in (first, second) if not _is_constant_somewhere(side))
            return next(varying, None) or self.pinned(size_of(first), "both stay in place")
        elif isinstance(first, Case) or isinstance(second, Case):
            pieces = self._unify_case(first, second)
        elif isinstance(first, Atom):
            self._unify_atom(first, second)
        elif isinstance(second, Atom):
            self._unify_atom(second, first)
        elif isinstance(first, Product) and isinstance(second, Product):
            pieces = self._unify_products(first, second)
        else:
            pieces = self._unify_blocks(first, second)
        return self._common(resolve(first), resolve(second), pieces)

    def _common(self, first: Expression, second: Expression, pieces: list[Expression] | None) -> Expression:
        """Returns the side that varies; where both are constant in places, what the pieces became."""
        for side in (first, second):
            if not _is_constant_somewhere(side):
                return side
        if pieces is None:
            # Nothing says any more along which factors it would be constant.
            return self._pinned_if_constant(first)
        if isinstance(first, Product) and isinstance(second, Product):
            return product(pieces)
        if isinstance(first, Case) and isinstance(second, Case):
            return case(first.tag, pieces)
        tag = first.tag if isinstance(first, Concat) and _matches(first, pieces) else Tag()
        return resolve(Concat(tag, tuple(pieces)))

    def _give_up(self, first: Expression, second: Expression, why: str) -> None:
        self.pin(first, why)
        self.pin(second, why)

    def _unify_atom(self, atom: Atom, other: Expression) -> None:
        if isinstance(other, Atom):
            root, child = sorted((atom, other), key=lambda a: a.number)
            pin = root.pin or child.pin
            self._pending.append((root, set(child.context)))
            child.link = root
            self._carry_over(child, root)
            root.flags |= child.flags
            if pin is not None:
                self._pin_atom(root, pin)
            return
        if isinstance(other, Concat) and is_fixed(other) and not _is_constant_somewhere(other):
            # Its blocks do not matter to an axis that cannot move at all.
            self._pin_atom(atom, next(reason for a in atoms_of(other) if (reason := a.pin) is not None))
            return
        other = self._self_contained(self._refreshed(other, atom))
        inside = atoms_of(other)
        if atom in inside or any(atom in a.context for a in inside):
            self._give_up(atom, other, BLOCKS_DIFFER)
            return
        if atom.pin is not None:
            for a in inside:
                self._pin_atom(a, atom.pin)
        for a in inside:
            a.flags |= atom.flags
            self._pending.append((a, atom.context | inside))
        self.bind(atom, other)

    def _refreshed(self, expression: Expression, like: Atom, outer: frozenset[Atom] = frozenset()) -> Expression:
        """Returns `expression` with constant stretches replaced by free atoms: it now describes data that vary.

        Beside other factors a new one is a family over them (query heads that share a key head).
        """
        if isinstance(expression, Replicated) and expression.size > 1:
            return self.atom(expression.size, like, context=like.context | outer)
        if isinstance(expression, Product):
            parts: list[Expression] = []
            for place, part in enumerate(expression.parts):
                others = {a for p in (*parts, *expression.parts[place + 1 :]) for a in atoms_of(p) if a.size > 1}
                parts.append(self._refreshed(part, like, outer | others))
            return product(parts)
        if isinstance(expression, Concat):
            return Concat(expression.tag, tuple(self._refreshed(part, like, outer) for part in expression.parts))
        if isinstance(expression, Case):
            return case(expression.tag, [self._refreshed(option, like, outer) for option in expression.options])
        return expression

    def _self_contained(self, expression: Expression) -> Expression:
        """Ties cases whose concatenation lies on another axis: a bound atom travels without that axis."""
        while True:
            places = occurrences((expression,))
            tags = {place.concat for place in places if place.concat is not None}
            cases = [p.case for p in places if p.case is not None and p.case.tag not in tags]
            # One that is pinned as a whole needs no block to look at, and its options may differ in their blocks.
            loose = next((found for found in cases if not is_inert(found)), None)
            if loose is None:
                return resolve(expression)
            self._collapse(loose)
            expression = resolve(expression)

    def _collapse(self, expression: Case) -> Expression:
        """Ties the options of a case; afterwards it no longer depends on another axis."""
        first = expression.options[0]
        for option in expression.options[1:]:
            self.unify(first, option)
        left = resolve(expression)
        if isinstance(left, Case):
            self.pin(left, BLOCKS_DIFFER)
        return left

    def _unify_case(self, first: Expression, second: Expression) -> list[Expression] | None:
        if isinstance(first, Case) and isinstance(second, Case) and first.tag is second.tag:
            return [self.unify(one, other) for one, other in zip(first.options, second.options, strict=True)]
        for side in (first, second):
            side = resolve(side)
            if isinstance(side, Case):
                self._collapse(side)
        first, second = resolve(first), resolve(second)
        if not isinstance(first, Case) and not isinstance(second, Case):
            return [self.unify(first, second)]
        return self._give_up(first, second, BLOCKS_DIFFER)

    def _unify_products(self, first: Product, second: Product) -> list[Expression] | None:
        common: list[Expression] = []
        ours, theirs = list(first.parts), list(second.parts)
        while ours and theirs:
            one, other = resolve(ours.pop(0)), resolve(theirs.pop(0))
            have, want = size_of(one), size_of(other)
            if have == want:
                common.append(self.unify(one, other))
            elif have == 1 or want == 1:
                (theirs if have == 1 else ours).insert(0, other if have == 1 else one)
            elif max(have, want) % min(have, want) == 0:
                small, large = (one, other) if have < want else (other, one)
                cut = self.split_product(large, [size_of(small), size_of(large) // size_of(small)])
                if cut is None:
                    return self._give_up(first, second, BLOCKS_DIFFER)
                common.append(self.unify(small, cut[0]))
                (theirs if have < want else ours).insert(0, cut[1])
            else:
                return self._give_up(first, second, BLOCKS_DIFFER)
        return common

    def _unify_blocks(self, first: Expression, second: Expression) -> list[Expression] | None:
        """Unifies two composites of which at least one is a concatenation."""
        if isinstance(first, Concat) and isinstance(second, Concat):
            ends = [_block_ends(first), _block_ends(second)]
            if ends[0] == ends[1]:
                tag, other = first.tag.root(), second.tag.root()
                if tag is not other:
                    other.link = tag
                return [self.unify(one, two) for one, two in zip(first.parts, second.parts, strict=True)]
            cuts = sorted(set(ends[0]) | set(ends[1]))
            sizes = [end - start for start, end in zip([0, *cuts], cuts, strict=False)]
        else:
            sizes = [size_of(p) for p in (first if isinstance(first, Concat) else second).parts]  # type: ignore[union-attr]
        blocks = [self.split_concat(first, sizes), self.split_concat(second, sizes)]
        if blocks[0] is not None and blocks[1] is not None:
            return [self.unify(one, two) for (one, _), (two, _) in zip(blocks[0], blocks[1], strict=True)]
        factors = first if isinstance(first, Product) else second
        if isinstance(factors, Product):
            sizes = [size for part in factors.parts if (size := size_of(part)) > 1]
            if len(sizes) < 2:
                return self._give_up(first, second, BLOCKS_DIFFER)  # nothing would become smaller
            rows = [self.split_product(first, sizes), self.split_product(second, sizes)]
            if rows[0] is not None and rows[1] is not None:
                # The factors are tied, but a product of them is no list of blocks: what is constant stays with `first`.
                for one, two in zip(rows[0], rows[1], strict=True):
                    self.unify(one, two)
                return [self._pinned_if_constant(first)]
        return self._give_up(first, second, BLOCKS_DIFFER)

    def _pinned_if_constant(self, expression: Expression) -> Expression:
        if _is_constant_somewhere(expression):
            self.pin(expression, BLOCKS_DIFFER)
            return self.pinned(size_of(expression), BLOCKS_DIFFER)
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


def _is_constant_somewhere(expression: Expression) -> bool:
    if isinstance(expression, Replicated):
        return expression.size > 1
    if isinstance(expression, Atom):
        return False
    inner = expression.options if isinstance(expression, Case) else expression.parts
    return any(_is_constant_somewhere(part) for part in inner)


def _matches(expression: Concat, pieces: Sequence[Expression]) -> bool:
    return [size_of(p) for p in expression.parts] == [size_of(p) for p in pieces]


def _block_ends(expression: Concat) -> list[int]:
    ends, total = [], 0
    for part in expression.parts:
        total += size_of(part)
        ends.append(total)
    return ends
