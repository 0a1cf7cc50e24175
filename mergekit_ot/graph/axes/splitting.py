"""Cutting axis expressions: into the factors of a reshape, and into the blocks of a split or a slice."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_ot.graph.axes.expressions import (
    Atom,
    Case,
    Concat,
    Expression,
    Product,
    Replicated,
    Selection,
    Tag,
    atoms_of,
    case,
    product,
    resolve,
    select,
    size_of,
)


class Splitter:
    """Refines atoms on demand; knows every atom, since cutting one changes those whose context it is in."""

    def __init__(self) -> None:
        self._indexed: dict[Atom, dict[Atom, None]] = {}

    def index_by(self, atom: Atom, context: set[Atom]) -> None:
        """Makes `atom` a family over `context`.

        Who may be indexed by whom is remembered, so that cutting an atom does not look through all others; entries that
        no longer hold are recognised by the context itself.
        """
        atom.context = context
        for outer in context:
            self._indexed.setdefault(outer, {})[atom] = None

    def atom(self, size: int, like: Atom | None = None, context: set[Atom] | None = None) -> Atom:
        """Returns a new atom with the context, pin and flags of `like`."""
        new = Atom(size, context if like is None or context is not None else like.context, like.pin if like else None)
        if like is not None:
            new.flags |= like.flags
        self.index_by(new, new.context)
        return new

    def bind(self, atom: Atom, expression: Expression) -> None:
        """Binds `atom` to `expression`; families indexed by the atom become indexed by its pieces."""
        atom.link = expression
        # Looked up again each time: rebinding a family also changes those that are indexed by it.
        while (other := self._dependent(atom)) is not None:
            other.context.discard(atom)
            resolved = resolve(expression)
            if isinstance(resolved, Atom | Product) and _first_tag(resolved) is None:
                self.index_by(other, other.context | {a for a in atoms_of(resolved) if a.size > 1})
            else:
                self.bind(other, self._over(other, resolved))

    def _carry_over(self, child: Atom, root: Atom) -> None:
        """Lets families indexed by `child` be indexed by `root`, so that they are found when that is cut."""
        for other in list(self._indexed.get(child, {})):
            if other.link is None and child in other.context:
                self.index_by(other, (other.context - {child} | {root}) - {other})

    def _dependent(self, atom: Atom) -> Atom | None:
        """Returns one unbound atom that is indexed by `atom`, the oldest first."""
        candidates = self._indexed.get(atom, {})
        for other in sorted(candidates, key=lambda o: o.number):
            if other.link is None and atom in other.context:
                return other
            del candidates[other]
        return None

    def _over(self, template: Atom, expression: Expression) -> Expression:
        """Returns what a family indexed by `expression` is: a case with one family per block."""
        found = _first_tag(expression)
        if found is None:
            seen = {a for a in atoms_of(expression) if a.size > 1 and a is not template}
            return self.atom(template.size, template, context=template.context | seen)
        tag, count = found
        options = [self._over(template, _at_block(expression, tag, block)) for block in range(count)]
        return Case(tag, tuple(options))

    def split_product(self, expression: Expression, sizes: Sequence[int]) -> list[Expression] | None:
        """Returns one expression per factor of a row-major index of `sizes`, or None where the blocks do not fit."""
        factors = self._factors(resolve(expression), [size for size in sizes if size != 1])
        if factors is None:
            return None
        rest = iter(factors)
        return [Replicated(1) if size == 1 else next(rest) for size in sizes]

    def _factors(self, expression: Expression, sizes: list[int]) -> list[Expression] | None:
        if len(sizes) <= 1:
            return [expression] if sizes else []
        if isinstance(expression, Atom):
            return self._factor_atom(expression, sizes)
        if isinstance(expression, Replicated):
            return [Replicated(size) for size in sizes]
        if isinstance(expression, Product):
            return self._factor_product(expression, sizes)
        if isinstance(expression, Concat):
            return self._factor_concat(expression, sizes)
        rows = [self._factors(resolve(option), sizes) for option in expression.options]
        if any(row is None for row in rows):
            return None
        return [case(expression.tag, column) for column in zip(*rows, strict=True)]  # type: ignore[arg-type]

    def _factor_atom(self, atom: Atom, sizes: list[int]) -> list[Expression]:
        parts: list[Expression] = []
        outer: set[Atom] = set()
        for size in sizes:
            part = self.atom(size, atom, context=atom.context | outer)
            parts.append(part)
            outer.add(part)
        self.bind(atom, Product(tuple(parts)))
        return parts

    def _factor_product(self, expression: Product, sizes: list[int]) -> list[Expression] | None:
        pending, factors = list(expression.parts), []
        for size in sizes[:-1]:
            taken: list[Expression] = []
            need = size
            while need > 1:
                part = resolve(pending.pop(0))
                have = size_of(part)
                if need % have == 0:
                    taken.append(part)
                    need //= have
                    continue
                cut = self._factors(part, [need, have // need]) if have % need == 0 else None
                if cut is None:
                    return None
                taken.append(cut[0])
                pending.insert(0, cut[1])
                need = 1
            factors.append(product(taken))
        return [*factors, product(pending)]

    def _factor_concat(self, expression: Concat, sizes: list[int]) -> list[Expression] | None:
        inner = math.prod(sizes[1:])
        outer_parts: list[Expression] = []
        inner_parts: list[Expression] = []
        waiting: list[Expression] = []
        merged = False
        for part in expression.parts:
            have = size_of(part)
            if not waiting and have % inner == 0:
                cut = self._factors(resolve(part), [s for s in (have // inner, inner) if s != 1])
                if cut is None:
                    return None
                outer_parts.append(cut[0] if have > inner else Replicated(1))
                inner_parts.append(cut[-1] if inner > 1 else Replicated(1))
                continue
            waiting.append(part)
            merged = True
            total = sum(size_of(p) for p in waiting)
            if total > inner:
                return None
            if total == inner:
                outer_parts.append(Replicated(1))
                inner_parts.append(Concat(Tag(), tuple(waiting)))
                waiting = []
        if waiting:
            return None
        tag = Tag() if merged else expression.tag
        rest = self._factors(case(tag, inner_parts), sizes[1:])
        return None if rest is None else [resolve(Concat(tag, tuple(outer_parts))), *rest]

    def split_concat(self, expression: Expression, sizes: Sequence[int]) -> list[tuple[Expression, Selection]] | None:
        """Returns (block, what the cut means for cases on other axes) per size, or None where it cannot be cut."""
        expression = resolve(expression)
        if len(sizes) == 1:
            return [(expression, {})]
        if isinstance(expression, Replicated):
            return [(Replicated(size), {}) for size in sizes]
        if isinstance(expression, Atom):
            parts = tuple(self.atom(size, expression) for size in sizes)
            tag = Tag()
            self.bind(expression, Concat(tag, parts))
            return [(part, {tag: (None, ((block, {}),))}) for block, part in enumerate(parts)]
        if isinstance(expression, Concat):
            return self._cut_concat(expression, sizes)
        if isinstance(expression, Product):
            return self._cut_product(expression, sizes)
        rows = [self.split_concat(option, sizes) for option in expression.options]
        if any(row is None for row in rows):
            return None
        return [
            (case(expression.tag, [piece for piece, _ in column]), {k: v for _, cut in column for k, v in cut.items()})
            for column in zip(*rows, strict=True)  # type: ignore[arg-type]
        ]

    def _cut_concat(self, expression: Concat, sizes: Sequence[int]) -> list[tuple[Expression, Selection]] | None:
        pending: list[tuple[int, Expression, Selection]] = [(i, p, {}) for i, p in enumerate(expression.parts)]
        blocks: list[tuple[Expression, Selection]] = []
        for size in sizes:
            taken: list[tuple[int, Expression, Selection]] = []
            need = size
            while need:
                index, part, cut = pending.pop(0)
                part = resolve(part)
                have = size_of(part)
                if have > need:
                    halves = self.split_concat(part, [need, have - need])
                    if halves is None:
                        return None
                    pending.insert(0, (index, halves[1][0], halves[1][1]))
                    part, cut, have = halves[0][0], halves[0][1], need
                taken.append((index, part, cut))
                need -= have
            if len(taken) == 1:
                index, part, cut = taken[0]
                blocks.append((part, {**cut, expression.tag: (None, ((index, cut),))}))
            else:
                tag = Tag()
                entries = tuple((index, cut) for index, _, cut in taken)
                blocks.append((Concat(tag, tuple(p for _, p, _ in taken)), {expression.tag: (tag, entries)}))
        return blocks

    def _cut_product(self, expression: Product, sizes: Sequence[int]) -> list[tuple[Expression, Selection]] | None:
        # A factor of one neuron has no order, and no place for a cut.
        parts = [part for part in expression.parts if size_of(part) > 1]
        if len(parts) < 2:
            return self.split_concat(parts[0], sizes) if parts else None
        inner = size_of(expression) // size_of(parts[0])
        if any(size % inner for size in sizes):
            inner = math.gcd(*sizes)
            factors = self._factors(expression, [s for s in (size_of(expression) // inner, inner) if s != 1])
            if factors is None or len(factors) < 2:
                return None
            outer, rest = factors
        else:
            outer, rest = parts[0], product(parts[1:])
        cuts = self.split_concat(outer, [size // inner for size in sizes])
        if cuts is None:
            return None
        return [(product([piece, select(rest, cut)]), cut) for piece, cut in cuts]


def _first_tag(expression: Expression) -> tuple[Tag, int] | None:
    """Returns the tag and the number of blocks of the first concatenation or case inside, outermost first."""
    if isinstance(expression, Concat):
        return expression.tag, len(expression.parts)
    if isinstance(expression, Case):
        return expression.tag, len(expression.options)
    if isinstance(expression, Product):
        for part in expression.parts:
            found = _first_tag(part)
            if found is not None:
                return found
    return None


def _at_block(expression: Expression, tag: Tag, block: int) -> Expression:
    """Returns `expression` where the axis stands in block `block` of the concatenation with `tag`."""
    if isinstance(expression, Concat) and expression.tag is tag:
        return resolve(expression.parts[block])
    if isinstance(expression, Product):
        return product([_at_block(part, tag, block) for part in expression.parts])
    return select(expression, {tag: (None, ((block, {}),))})
