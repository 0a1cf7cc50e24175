"""The two conditions that keep families sound, restored after every operation."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_ot.graph.axes.expressions import Case, Expression, is_inert
from mergekit_ot.graph.axes.occurrences import Occurrence, is_visible, occurrences
from mergekit_ot.graph.axes.unification import collapse
from mergekit_ot.graph.axes.union_find import UnionFind


def settle(atoms: UnionFind, tensors: Sequence[Sequence[Expression]]) -> None:
    """Restores what must hold after an operation for the labels of all tensors that it read or made.

    1. A family keeps of its context what all allow that were unified with it.
    2. A context (or the concatenation of a case) is visible exactly once in every tensor in which the family is;
       otherwise the family is tied across it.
    """
    atoms.narrow()
    for labels in tensors:
        while (loose := _narrow_to_visible(atoms, labels)) is not None:
            collapse(atoms, loose)
    if atoms.has_pending:
        settle(atoms, tensors)


def _narrow_to_visible(atoms: UnionFind, labels: Sequence[Expression]) -> Case | None:
    """Takes from every context what the family does not see; returns the first case that does not see its blocks."""
    places = occurrences(labels)
    for place in places:
        if place.case is not None:
            # One that is pinned as a whole needs no block to look at.
            if not is_inert(place.case) and not is_visible(_of_tag(places, place.case), place):
                return place.case
        elif place.atom is not None and place.atom.context:
            atoms.index_by(place.atom, {a for a in atoms.unbound(place.atom.context) if _sees(places, place, a)})
    return None


def _of_tag(places: Sequence[Occurrence], case: Case) -> list[Occurrence]:
    return [place for place in places if place.concat is case.tag]


def _sees(places: Sequence[Occurrence], family: Occurrence, atom: object) -> bool:
    return atom is not family.atom and is_visible([place for place in places if place.atom is atom], family)
