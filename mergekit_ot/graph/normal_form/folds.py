"""Guesses which gains and biases of norms may be folded into the linear maps that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from mergekit_ot.graph.capture.program import named_arguments, operation_name, shape_of
from mergekit_ot.graph.normal_form.maps import LinearMap, ProgramView, reads_whole
from mergekit_ot.graph.normal_form.norms import Norm
from mergekit_ot.graph.normal_form.rewrites import Fold, Reader, Refusal
from mergekit_ot.graph.normal_form.tracking import is_scaling, moved, numbered, stripped


class _Refused(Exception):
    """A fold that is not exact; its text is the reason."""


@dataclass(frozen=True)
class FoldGuess:
    """A fold, the norms that it is of, and the maps that read them."""

    fold: Fold
    norms: tuple[Norm, ...]
    maps: tuple[LinearMap, ...]


def norms_by_gain(norms: Sequence[Norm]) -> list[tuple[Norm, ...]]:
    """Returns the norms that have a gain or a bias, those with the same ones together."""
    families: dict[tuple[str | None, ...], list[Norm]] = {}
    for norm in norms:
        if norm.gain is not None or norm.bias is not None:
            families.setdefault((norm.gain or norm.bias,), []).append(norm)
    return [tuple(family) for family in families.values()]


def guess_folds(view: ProgramView, norms: Sequence[Norm]) -> tuple[list[FoldGuess], list[Refusal]]:
    """Returns the folds that the data flow suggests, and why the other gains and biases stay."""
    guesses, refusals = [], []
    for family in norms_by_gain(norms):
        try:
            guesses.append(_guess(view, family))
        except _Refused as refused:
            names = dict.fromkeys((family[0].gain, *(norm.bias for norm in family)))
            refusals += [Refusal(name, str(refused)) for name in names if name is not None]
    return guesses, refusals


def _guess(view: ProgramView, family: tuple[Norm, ...]) -> FoldGuess:
    first = family[0]
    kinds = {(norm.gain, norm.bias, norm.offset, norm.is_centred, norm.size) for norm in family}
    if len(kinds) > 1:
        raise _Refused(f"'{first.gain or first.bias}' belongs to norms that differ in their biases or their kind.")
    affine = frozenset[fx.Node]().union(*(norm.affine for norm in family))
    for name in (first.gain, first.bias):
        if name is not None:
            _check_own(view, name, affine, family)
    maps = [linear_map for norm in family for linear_map in _readers(view, norm)]
    if not maps:
        raise _Refused("No linear map reads its norm.")
    readers = _readers_once(maps)
    _check_readers(view, maps)
    padded = next((linear_map for linear_map in maps if first.bias is not None and linear_map.is_padded), None)
    if padded is not None:
        raise _Refused(f"'{padded.reader.weight.name}' reads the norm with zeros around it, which its bias is not in.")
    is_constant = first.bias is not None and any(reader.bias is None for reader in readers)
    if is_constant and not first.is_centred:
        bare = next(reader.weight.name for reader in readers if reader.bias is None)
        raise _Refused(f"'{bare}' reads the norm and has no bias that could take the norm's.")
    written = [name for name in (first.gain, first.bias) if name is not None]
    written += [reader.weight.name for reader in readers] + [r.bias for r in readers if r.bias is not None]
    fold = Fold(view.tied(iter(written)), first.gain, first.bias, readers, first.offset, is_constant)
    return FoldGuess(fold, family, tuple(maps))


def _check_own(view: ProgramView, name: str, affine: frozenset[fx.Node], family: tuple[Norm, ...]) -> None:
    """Checks that nothing else reads a gain or a bias, and that it stands on one stream.

    Raises:
        _Refused: Says what reads it, or that the norm reads a concatenation.
    """
    other = next((node for node in view.readers_of(name) if node not in affine), None)
    if other is not None:
        raise _Refused(f"'{name}' is also read by {view.where(other)}.")
    for norm in family:
        source = stripped(norm.source)
        if isinstance(source, fx.Node) and operation_name(source) == "aten.cat":
            rank = len(shape_of(source.meta.get("val")) or ())
            if named_arguments(source)["dim"] % rank == rank - 1:
                raise _Refused("Its norm reads a concatenation: no single stream stands on its axis.")
    if view.is_joined(name, len(view.graph_shape(name)) - 1) and len(view.groups_on(name, -1)) > 1:
        raise _Refused("Its norm reads several groups of neurons one after the other: no single stream.")


def _readers(view: ProgramView, norm: Norm) -> list[LinearMap]:
    """Returns the linear maps that read a norm.

    Raises:
        _Refused: Something else reads it.
    """
    maps, odd = readers_of_value(view, norm.end, is_scaled=norm.bias is None)
    if odd is not None:
        raise _Refused(_odd_reader(view, odd))
    return maps


def readers_of_value(view: ProgramView, end: fx.Node, is_scaled: bool = True) -> tuple[list[LinearMap], fx.Node | None]:
    """Returns the linear maps that read a value on the last axis, and the first operation that reads it otherwise.

    Args:
        view: The program.
        end: The operation that holds the value.
        is_scaled: Whether a map may read a multiple of it.
    """
    tracked: dict[fx.Node, Tensor] = {}
    shape = shape_of(end.meta.get("val"))
    if not shape:
        return [], end
    tracked[end] = numbered(shape, len(shape) - 1)
    maps: list[LinearMap] = []
    odd: fx.Node | None = None
    waiting = [end]
    while waiting:
        node = waiting.pop(0)
        for user in view.users(node):
            linear_map = view.maps.get(user)
            result = moved(user, tracked) if user not in tracked else None
            if result is None and is_scaled and user not in tracked and is_scaling(user, node):
                result = tracked[node]
            if linear_map is not None and linear_map.source is node and reads_whole(linear_map, tracked[node]):
                maps.append(linear_map)
            elif result is not None:
                tracked[user] = result
                waiting.append(user)
            elif user not in tracked:
                odd = odd or user
    return maps, odd


def _odd_reader(view: ProgramView, node: fx.Node) -> str:
    if node.op == "output":
        return "Its norm is an output of the model itself, so nothing behind it could take the gain."
    if operation_name(node) == "aten.add":
        return f"Its norm is read by {view.where(node)}: a sum (a stream behind the norm) cannot take the gain."
    return f"Its norm is read by {view.where(node)}, which is no linear map of a parameter that could take the gain."


def _readers_once(maps: Sequence[LinearMap]) -> tuple[Reader, ...]:
    """Returns the readers of maps, each once.

    Raises:
        _Refused: Two maps share a weight or a bias but not both.
    """
    readers = tuple(dict.fromkeys(linear_map.reader for linear_map in maps))
    rows = {linear_map.reader: (linear_map.rows, linear_map.bias) for linear_map in maps}
    for number, reader in enumerate(readers):
        for other in readers[:number]:
            (weight, bias), (weight_other, bias_other) = rows[reader], rows[other]
            if weight.overlaps(weight_other) or (bias and bias_other and bias.overlaps(bias_other)):
                raise _Refused(f"'{weight.name}' is read in several ways by maps behind its norm.")
    return readers


def _check_readers(view: ProgramView, maps: Sequence[LinearMap]) -> None:
    """Checks that nothing but these maps reads what they take from their weights and biases.

    Raises:
        _Refused: Names the weight, and what else reads it.
    """
    own = {linear_map.node for linear_map in maps}
    for linear_map in maps:
        for place in (linear_map.rows, linear_map.bias):
            if place is None:
                continue
            for node in view.readers_of(place.name):
                if not _is_apart(view, node, place, own, linear_map):
                    raise _Refused(
                        f"'{place.name}' reads the norm and is also read by {view.where(node)}: the two are tied. "
                        "Untied, it could take the gain."
                    )


def _is_apart(view: ProgramView, node: fx.Node, place: object, own: set[fx.Node], linear_map: LinearMap) -> bool:
    """Whether an operation that reads a parameter belongs to these maps, or reads other rows of it."""
    if node in own or node is linear_map.output:
        return True
    other = view.maps.get(node) or view.by_output.get(node)
    if other is None:
        return False
    if other.node in own:
        return True
    others = [where for where in (other.rows, other.bias) if where is not None]
    return not any(where.overlaps(place) for where in others)  # type: ignore[arg-type]
