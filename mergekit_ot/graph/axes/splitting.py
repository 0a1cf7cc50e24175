"""Cutting axis expressions: into the factors of a reshape, and into the blocks of a split or a slice.

A cut refines: the atoms that it goes through are bound to their pieces, so every other tensor that holds them is cut
too. Where a cut cannot be made, None is returned, and the caller pins or ties; what was refined on the way stays so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

from mergekit_ot.graph.axes.expressions import (
    Atom,
    Case,
    Concat,
    Expression,
    Product,
    Replicated,
    Selection,
    Tag,
    at_one,
    case,
    product,
    resolve,
    select,
    size_of,
)
from mergekit_ot.graph.axes.union_find import UnionFind

# A block of an axis, and what cutting it out means for cases on other axes.
Piece = tuple[Expression, Selection]

_Part = TypeVar("_Part")


def split_product(atoms: UnionFind, expression: Expression, sizes: Sequence[int]) -> list[Expression] | None:
    """Returns one expression per factor of a row-major index of `sizes`, or None where the blocks do not fit.

    After: the product of the factors is the expression. An atom that is split becomes outer neurons, and for each of
    them a family of inner ones.
    """
    factors = _factors(atoms, expression, [size for size in sizes if size != 1])
    if factors is None:
        return None
    rest = iter(factors)
    return [Replicated(1) if size == 1 else next(rest) for size in sizes]


def _factors(atoms: UnionFind, expression: Expression, sizes: list[int]) -> list[Expression] | None:
    expression = resolve(expression)
    if len(sizes) <= 1:
        return [expression] if sizes else []
    if isinstance(expression, Atom):
        return _factor_atom(atoms, expression, sizes)
    if isinstance(expression, Replicated):
        return [Replicated(size) for size in sizes]
    if isinstance(expression, Product):
        return _factor_product(atoms, expression, sizes)
    if isinstance(expression, Concat):
        return _factor_concat(atoms, expression, sizes)
    return _factor_case(atoms, expression, sizes)


def _factor_atom(atoms: UnionFind, atom: Atom, sizes: list[int]) -> list[Expression]:
    factors: list[Expression] = []
    outer: set[Atom] = set()
    for size in sizes:
        factor = atoms.atom(size, atom, context=atom.context | outer)
        factors.append(factor)
        outer.add(factor)
    atoms.bind(atom, Product(tuple(factors)))
    return factors


def _factor_product(atoms: UnionFind, expression: Product, sizes: list[int]) -> list[Expression] | None:
    pending, factors = list(expression.factors), []
    for size in sizes[:-1]:
        factor = _take(atoms, pending, size)
        if factor is None:
            return None
        factors.append(factor)
    return [*factors, product(pending)]


def _take(atoms: UnionFind, pending: list[Expression], size: int) -> Expression | None:
    """Takes the outermost factors of `pending` whose product has `size`, cutting the last one where it is too large."""
    taken: list[Expression] = []
    need = size
    while need > 1:
        factor = resolve(pending.pop(0))
        have = size_of(factor)
        if need % have == 0:
            taken.append(factor)
            need //= have
            continue
        cut = _factors(atoms, factor, [need, have // need]) if have % need == 0 else None
        if cut is None:
            return None
        taken.append(cut[0])
        pending.insert(0, cut[1])
        need = 1
    return product(taken)


def _factor_case(atoms: UnionFind, expression: Case, sizes: list[int]) -> list[Expression] | None:
    rows = _each_cut(expression.options, lambda option: _factors(atoms, option, sizes))
    return None if rows is None else [case(expression.tag, column) for column in zip(*rows, strict=True)]


def _each_cut(
    expressions: Sequence[Expression], cut: Callable[[Expression], list[_Part] | None]
) -> list[list[_Part]] | None:
    """Returns every expression cut, None where one of them cannot be; those behind it are left as they are."""
    rows: list[list[_Part]] = []
    for expression in expressions:
        row = cut(expression)
        if row is None:
            return None
        rows.append(row)
    return rows


def _factor_concat(atoms: UnionFind, expression: Concat, sizes: list[int]) -> list[Expression] | None:
    """Cuts the blocks into rows of the inner factors; several short blocks make one row together."""
    width = math.prod(sizes[1:])
    rows: list[tuple[Expression, Expression]] = []
    waiting: list[Expression] = []
    is_merged = False
    for block in expression.blocks:
        if not waiting and size_of(block) % width == 0:
            row = _rows_of(atoms, block, width)
            if row is None:
                return None
            rows.append(row)
            continue
        waiting.append(block)
        is_merged = True
        total = sum(map(size_of, waiting))
        if total > width:
            return None
        if total == width:
            rows.append((Replicated(1), Concat(Tag(), tuple(waiting))))
            waiting = []
    if waiting:
        return None
    return _stacked(atoms, Tag() if is_merged else expression.tag, rows, sizes[1:])


def _stacked(
    atoms: UnionFind, tag: Tag, rows: list[tuple[Expression, Expression]], sizes: list[int]
) -> list[Expression] | None:
    """Returns the factors of rows one after the other: how many they are, and the factors of a row."""
    rest = _factors(atoms, case(tag, [inner for _, inner in rows]), sizes)
    return None if rest is None else [resolve(Concat(tag, tuple(outer for outer, _ in rows))), *rest]


def _rows_of(atoms: UnionFind, block: Expression, width: int) -> tuple[Expression, Expression] | None:
    """Returns a block as (how many rows, one row of `width`)."""
    count = size_of(block) // width
    cut = _factors(atoms, block, [size for size in (count, width) if size != 1])
    if cut is None:
        return None
    return cut[0] if count > 1 else Replicated(1), cut[-1] if width > 1 else Replicated(1)


def split_concat(atoms: UnionFind, expression: Expression, sizes: Sequence[int]) -> list[Piece] | None:
    """Returns (block, what the cut means for cases on other axes) per size, or None where it cannot be cut.

    After: the blocks one after the other are the expression. An atom that is cut becomes a concatenation of blocks that
    no neuron leaves; families that it indexes become cases over it.
    """
    expression = resolve(expression)
    if len(sizes) == 1:
        return [(expression, {})]
    if isinstance(expression, Replicated):
        return [(Replicated(size), {}) for size in sizes]
    if isinstance(expression, Atom):
        blocks = tuple(atoms.atom(size, expression) for size in sizes)
        tag = Tag()
        atoms.bind(expression, Concat(tag, blocks))
        return [(block, at_one(tag, number)) for number, block in enumerate(blocks)]
    if isinstance(expression, Concat):
        return _cut_concat(atoms, expression, sizes)
    if isinstance(expression, Product):
        return _cut_product(atoms, expression, sizes)
    return _cut_case(atoms, expression, sizes)


def _cut_case(atoms: UnionFind, expression: Case, sizes: Sequence[int]) -> list[Piece] | None:
    rows = _each_cut(expression.options, lambda option: split_concat(atoms, option, sizes))
    if rows is None:
        return None
    blocks: list[Piece] = []
    for column in zip(*rows, strict=True):
        together: dict[Tag, tuple[Tag | None, tuple[tuple[int, Selection], ...]]] = {}
        for _, cut in column:
            together |= cut
        blocks.append((case(expression.tag, [block for block, _ in column]), together))
    return blocks


def _cut_concat(atoms: UnionFind, expression: Concat, sizes: Sequence[int]) -> list[Piece] | None:
    pending: list[tuple[int, Expression, Selection]] = [(i, block, {}) for i, block in enumerate(expression.blocks)]
    blocks: list[Piece] = []
    for size in sizes:
        taken = _take_blocks(atoms, pending, size)
        if taken is None:
            return None
        if len(taken) == 1:
            index, block, cut = taken[0]
            blocks.append((block, {**cut, expression.tag: (None, ((index, cut),))}))
        else:
            tag = Tag()
            entries = tuple((index, cut) for index, _, cut in taken)
            blocks.append((Concat(tag, tuple(block for _, block, _ in taken)), {expression.tag: (tag, entries)}))
    return blocks


def _take_blocks(
    atoms: UnionFind, pending: list[tuple[int, Expression, Selection]], size: int
) -> list[tuple[int, Expression, Selection]] | None:
    """Takes the first blocks of `pending` that have `size` together, cutting the last one where it is too large."""
    taken: list[tuple[int, Expression, Selection]] = []
    need = size
    while need:
        index, block, cut = pending.pop(0)
        block = resolve(block)
        have = size_of(block)
        if have > need:
            halves = split_concat(atoms, block, [need, have - need])
            if halves is None:
                return None
            pending.insert(0, (index, *halves[1]))
            (block, cut), have = halves[0], need
        taken.append((index, block, cut))
        need -= have
    return taken


def _cut_product(atoms: UnionFind, expression: Product, sizes: Sequence[int]) -> list[Piece] | None:
    # A factor of one neuron has no order, and no place for a cut.
    factors = [factor for factor in expression.factors if size_of(factor) > 1]
    if len(factors) < 2:
        return split_concat(atoms, factors[0], sizes) if factors else None
    outer, rest = factors[0], product(factors[1:])
    if any(size % size_of(rest) for size in sizes):
        # The cut goes through an outer index: the outermost factor takes in what lies between.
        regrouped = _rows_at(atoms, expression, math.gcd(*sizes))
        if regrouped is None:
            return None
        outer, rest = regrouped
    width = size_of(rest)
    cuts = split_concat(atoms, outer, [size // width for size in sizes])
    if cuts is None:
        return None
    return [(product([block, select(rest, cut)]), cut) for block, cut in cuts]


def _rows_at(atoms: UnionFind, expression: Product, width: int) -> list[Expression] | None:
    """Returns a product as (how many rows, one row of `width`), None where it has only one row or rows of one."""
    sizes = [size_of(expression) // width, width]
    return None if 1 in sizes else _factors(atoms, expression, sizes)
