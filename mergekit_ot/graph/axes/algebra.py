"""The axis algebra that rules work with, and the two conditions that keep families sound."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_ot.graph.axes.expressions import (
    Atom,
    Concat,
    Expression,
    Occurrence,
    Replicated,
    Tag,
    atoms_of,
    case,
    is_fixed,
    is_inert,
    occurrences,
    product,
    resolve,
    select,
    size_of,
)
from mergekit_ot.graph.axes.unification import Unifier


class AxisAlgebra(Unifier):
    """What a rule does with the labels of its operands: join, cut, multiply, flag, and settle at the end."""

    def replicated(self, size: int) -> Expression:
        """Returns an axis along which the tensor is constant."""
        return Replicated(size)

    def product(self, parts: Sequence[Expression]) -> Expression:
        """Returns the row-major product of axes, outermost first."""
        return product(list(parts))

    def size(self, expression: Expression) -> int:
        """Returns the number of indices along an axis."""
        return size_of(expression)

    def concat(self, tensors: Sequence[Sequence[Expression]], axis: int) -> list[Expression]:
        """Returns the labels of tensors concatenated along `axis`; other axes that differ become cases."""
        tag = Tag()
        labels: list[Expression] = []
        for position, column in enumerate(zip(*tensors, strict=True)):
            for label in column:
                self.touch(label)
            resolved = [resolve(label) for label in column]
            varying = [label for label in resolved if not isinstance(label, Replicated)]
            if position == axis:
                labels.append(Concat(tag, tuple(resolved)))
            elif all(label == varying[0] for label in varying):
                # What is constant fits the order of the others.
                labels.append(varying[0] if varying else resolved[0])
            elif all(isinstance(label, Atom) and label.pin is not None for label in varying):
                for label in varying[1:]:
                    self.unify(varying[0], label)
                labels.append(resolve(varying[0]))
            elif all(is_fixed(label) for label in varying):
                labels.append(self.pinned(size_of(varying[0]), "stays in place in every part"))
            else:
                labels.append(case(tag, resolved))
        return [resolve(label) for label in labels]

    def cut(self, labels: Sequence[Expression], axis: int, sizes: Sequence[int]) -> list[list[Expression]] | None:
        """Returns the labels of the blocks of `sizes` along `axis`, or None where it cannot be cut there."""
        sizes = [size for size in sizes if size]
        for label in labels:
            self.touch(label)
        blocks = self.split_concat(labels[axis], sizes)
        if blocks is None:
            return None
        return [
            [piece if i == axis else select(label, chosen) for i, label in enumerate(labels)]
            for piece, chosen in blocks
        ]

    def flag(self, expression: Expression, flag: str) -> None:
        """Marks the groups of an axis: ``uniform marginals only`` or ``size-sensitive``."""
        for atom in atoms_of(expression):
            atom.flags.add(flag)

    def settle(self, tensors: Sequence[Sequence[Expression]]) -> None:
        """Restores what must hold after an operation for the labels of all tensors that it read or made.

        Contexts of unified atoms are intersected, and a context (or the concatenation of a case) must be visible
        exactly once in every tensor in which the family is; otherwise the family is tied across it.
        """
        while self._pending:
            expression, allowed = self._pending.pop()
            inside = atoms_of(resolve(expression))
            permitted = self._expand(allowed) | inside
            for atom in inside:
                self.index_by(atom, self._expand(atom.context) & permitted - {atom})
        for labels in tensors:
            while self._scope_once(labels):
                pass
        if self._pending:
            self.settle(tensors)

    def _expand(self, context: set[Atom]) -> set[Atom]:
        return {a for c in context for a in atoms_of(resolve(c)) if a.size > 1}

    def _scope_once(self, labels: Sequence[Expression]) -> bool:
        places = occurrences(list(labels))
        if not any((p.atom is not None and p.atom.context) or p.case is not None for p in places):
            return False
        for place in places:
            if place.case is not None:
                # One that is pinned as a whole needs no block to look at.
                if not is_inert(place.case) and not _is_visible(
                    [p for p in places if p.concat is place.case.tag], place
                ):
                    self._collapse(place.case)
                    return True
            elif place.atom is not None and place.atom.context:
                seen = {
                    c
                    for c in self._expand(place.atom.context)
                    if c is not place.atom and _is_visible([p for p in places if p.atom is c], place)
                }
                self.index_by(place.atom, seen)
        return False


def _is_visible(candidates: list[Occurrence], place: Occurrence) -> bool:
    """Whether exactly one of the candidates stands where `place` can see it; its own axis goes first."""
    seen = [(c, c.is_seen_from(place)) for c in candidates]
    near = [visible for c, visible in seen if visible is not None and c.axis == place.axis]
    far = [visible for c, visible in seen if visible is not None and c.axis != place.axis]
    found = near or far
    return len(found) == 1 and bool(found[0])
