"""Concatenating and cutting whole tensors: what happens on one axis, and what it means on the others."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from mergekit_ot.graph.axes.expressions import (
    Atom,
    Concat,
    Expression,
    Replicated,
    Tag,
    case,
    is_fixed,
    resolve,
    select,
    size_of,
)
from mergekit_ot.graph.axes.splitting import split_concat
from mergekit_ot.graph.axes.unification import unify
from mergekit_ot.graph.axes.union_find import UnionFind


def concat(atoms: UnionFind, tensors: Sequence[Sequence[Expression]], axis: int) -> list[Expression]:
    """Returns the labels of tensors concatenated along `axis`; other axes that differ become cases over its tag."""
    tag = Tag()
    labels: list[Expression] = []
    for position, column in enumerate(zip(*tensors, strict=True)):
        for label in column:
            atoms.touch(label)
        resolved = [resolve(label) for label in column]
        labels.append(Concat(tag, tuple(resolved)) if position == axis else _beside(atoms, tag, resolved))
    return [resolve(label) for label in labels]


def _beside(atoms: UnionFind, tag: Tag, labels: list[Expression]) -> Expression:
    """Returns the label of an axis beside the one that is concatenated, from its labels in the tensors."""
    # What is constant fits the order of the others.
    varying = [label for label in labels if not isinstance(label, Replicated)]
    if all(label == varying[0] for label in varying):
        return varying[0] if varying else labels[0]
    if all(map(is_fixed, varying)):
        if all(isinstance(label, Atom) for label in varying):
            return functools.reduce(functools.partial(unify, atoms), varying)
        return atoms.pinned(size_of(varying[0]), "stays in place in every part")
    return case(tag, labels)


def cut(
    atoms: UnionFind, labels: Sequence[Expression], axis: int, sizes: Sequence[int]
) -> list[list[Expression]] | None:
    """Returns the labels of the blocks of `sizes` along `axis`, or None where it cannot be cut there.

    After: in the labels of each block, a case over what was cut is the option of that block.
    """
    for label in labels:
        atoms.touch(label)
    blocks = split_concat(atoms, labels[axis], [size for size in sizes if size])
    if blocks is None:
        return None
    tensors: list[list[Expression]] = []
    for block, chosen in blocks:
        selected = [select(label, chosen) for label in labels]
        selected[axis] = block
        tensors.append(selected)
    return tensors
