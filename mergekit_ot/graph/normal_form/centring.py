"""Guesses which streams may be centred: those that LayerNorms alone read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import fx

from mergekit_ot.graph.normal_form.folds import FoldGuess, readers_of_value
from mergekit_ot.graph.normal_form.maps import ProgramView
from mergekit_ot.graph.normal_form.norms import Norm
from mergekit_ot.graph.normal_form.rewrites import Centre, Place, Refusal
from mergekit_ot.graph.normal_form.streams import Stream, StreamFinder


@dataclass
class CentreGuess:
    """Centres by group, the groups on which everything is centred by them, and why others are not."""

    centres: dict[str, Centre] = field(default_factory=dict)
    whole: set[str] = field(default_factory=set)
    refusals: list[Refusal] = field(default_factory=list)


def guess_centres(view: ProgramView, norms: Sequence[Norm], folds: Sequence[FoldGuess]) -> CentreGuess:
    """Returns the streams that may be centred once these folds are done."""
    guess = CentreGuess()
    centred = [norm for norm in norms if norm.is_centred]
    clean = _clean(centred, folds)
    for key in dict.fromkeys(key for norm in centred for key in _keys(view, norm)):
        _guess(view, key, centred, clean, guess)
    return guess


def _keys(view: ProgramView, norm: Norm) -> Iterator[str]:
    """Yields the group on which a norm stands: of its gain, or of what reads it."""
    name = norm.gain or norm.bias
    places = [(name, len(view.graph_shape(name)) - 1)] if name is not None else []
    maps, _ = readers_of_value(view, norm.end) if name is None else ([], None)
    places += [(linear_map.reader.weight.name, linear_map.reader.weight.axis) for linear_map in maps]
    for place in places:
        keys = view.groups_on(*place)
        yield from keys if len(keys) == 1 else ()


def _clean(norms: Sequence[Norm], folds: Sequence[FoldGuess]) -> list[Norm]:
    """Returns the norms whose values are orthogonal to the all-ones vector, gains and biases folded."""
    done = {norm.end for guess in folds if not guess.fold.is_constant for norm in guess.norms}
    return [norm for norm in norms if norm.end in done or (norm.gain is None and norm.bias is None)]


def _guess(view: ProgramView, key: str, norms: Sequence[Norm], clean: Sequence[Norm], guess: CentreGuess) -> None:
    finder = StreamFinder(view, key, norms)
    streams = finder.find()
    allowed: dict[tuple[str, int], list[tuple[fx.Node, Place]]] = {}
    for norm in (norm for norm in clean if key in _keys(view, norm)):
        for linear_map in readers_of_value(view, norm.end)[0]:
            place = linear_map.reader.weight
            allowed.setdefault((place.name, place.axis), []).append((linear_map.node, place))
    fit = [stream for stream in streams if stream.is_fit]
    for node, places in ((node, places) for stream in fit for node, places in stream.makers.items()):
        for place in places:
            using = finder.sums_of(node, place.name)
            allowed.setdefault((place.name, place.axis), []).extend((user, place) for user in using)
    centred = {where: places for where, places in allowed.items() if not _others(view, where, places)}
    refused = {where for where in allowed if where not in centred}
    wanted = {(place.name, place.axis) for s in fit for places in s.makers.values() for place in places}
    guess.refusals += [Refusal(name, _why_tied(view, (name, axis), allowed)) for name, axis in sorted(refused & wanted)]
    guess.refusals += [
        _why_unfit(view, stream) for stream in streams if stream.has_norm and stream.makers and stream.odd
    ]
    guess.refusals += [r for stream in fit for r in _why_strange(view, stream)]
    places = tuple(dict.fromkeys(place for entries in centred.values() for _, place in entries))
    if places and fit:
        guess.centres[key] = Centre(view.tied(place.name for place in places), places)
    is_all_fit = all(stream.is_fit and not stream.strangers for stream in streams if stream.makers)
    if places and fit and is_all_fit and not refused & wanted and finder.is_complete(streams):
        guess.whole.add(key)


def _others(view: ProgramView, where: tuple[str, int], places: Sequence[tuple[fx.Node, Place]]) -> list[fx.Node]:
    """Returns what reads the numbers of these places besides the operations that may."""
    own = {node for node, _ in places}
    others = []
    for node in view.readers_of(where[0]):
        linear_map = view.maps.get(node) or view.by_output.get(node)
        if node in own or (linear_map is not None and (linear_map.node in own or linear_map.output in own)):
            continue
        if linear_map is None or any(linear_map.rows.overlaps(place) for _, place in places):
            others.append(node)
    return others


def _why_tied(
    view: ProgramView, where: tuple[str, int], allowed: dict[tuple[str, int], list[tuple[fx.Node, Place]]]
) -> str:
    node = _others(view, where, allowed[where])[0]
    return (
        f"It writes to the stream and is also read by {view.where(node)}, which does not allow to centre it: the two "
        "are tied. Untied, it could be centred."
    )


def _why_unfit(view: ProgramView, stream: Stream) -> Refusal:
    name = next(iter(stream.makers.values()))[0].name
    return Refusal(
        name, f"It writes to a stream that is read by {view.where(stream.odd[0])}, not through a LayerNorm alone."
    )


def _why_strange(view: ProgramView, stream: Stream) -> Iterator[Refusal]:
    for node in stream.strangers:
        name = next(iter(stream.makers.values()))[0].name
        yield Refusal(
            name, f"The stream that it writes to is not centred: {view.where(node)} adds to it what cannot be centred."
        )
