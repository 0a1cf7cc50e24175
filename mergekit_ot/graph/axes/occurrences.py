"""Where atoms, concatenations and cases stand in the labels of a tensor, and what is seen from where."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mergekit_ot.graph.axes.expressions import Atom, Case, Concat, Expression, Tag, pieces, resolve


@dataclass(frozen=True)
class Occurrence:
    """A place where an atom, the `Concat` of a tag, or a `Case` stands in the labels of a tensor.

    Attributes:
        axis: Of the tensor.
        guards: (tag, block) of every concatenation or case that it stands inside: it exists in these blocks only.
        atom: The atom that stands there, if it is one.
        concat: The tag of the concatenation that stands there, if it is one.
        case: The case that stands there, if it is one.
    """

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


def occurrences(labels: Sequence[Expression]) -> list[Occurrence]:
    """Returns every place of every atom, concatenation and case in the labels of one tensor."""
    places: list[Occurrence] = []
    for axis, label in enumerate(labels):
        places.extend(_walk(resolve(label), axis, ()))
    return places


def _walk(expression: Expression, axis: int, guards: tuple[tuple[Tag, int], ...]) -> Iterator[Occurrence]:
    if isinstance(expression, Atom):
        yield Occurrence(axis, guards, atom=expression)
    elif isinstance(expression, Concat):
        yield Occurrence(axis, guards, concat=expression.tag)
    elif isinstance(expression, Case):
        yield Occurrence(axis, guards, case=expression)
    for block, piece in enumerate(pieces(expression)):
        inside = (*guards, (expression.tag, block)) if isinstance(expression, Concat | Case) else guards
        yield from _walk(piece, axis, inside)


def is_visible(candidates: Sequence[Occurrence], place: Occurrence) -> bool:
    """Whether exactly one of the candidates stands where `place` can see it; its own axis goes first."""
    near: list[bool] = []
    far: list[bool] = []
    for candidate in candidates:
        visible = candidate.is_seen_from(place)
        if visible is not None:
            (near if candidate.axis == place.axis else far).append(visible)
    return (near or far) == [True]
