"""Sources whose numbers are of different types: all are read in the types of the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from mergekit_ot.errors import CheckpointError
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.storage.casting import CastStore
from mergekit_ot.storage.finite import OF_A_MODEL, FiniteStore
from mergekit_ot.storage.store import TensorStore

_Kinds = Mapping[str, torch.dtype]


def in_one_type(sources: tuple[SourceModel, ...]) -> tuple[tuple[SourceModel, ...], tuple[str, ...]]:
    """Returns the sources with their numbers in the types of the first, single precision at least, and what was done.

    Raises:
        CheckpointError: A weight is of whole numbers, or complex in one source and real in another.
    """
    if not sources:
        return sources, ()
    first = sources[0]
    built = _kinds(first)
    expected = {name: first.state.dtype(name) for name in first.state.names}
    cast, notes = [], []
    for source in sources:
        _check_kinds(source, built)
        others = {} if source is first else _to_cast(source.state, expected, source.name, first.name)
        cast.append(_cast(source, others, built))
        if others:
            name, kind = next(iter(others.items()))
            notes.append(
                f"{source.name} holds {_name(source.state.dtype(name))} where {first.name} holds "
                f"{_name(expected[name])} ('{name}'{_more(others)}): computed in {_name(kind)}, and the fusion has the "
                f"types of {first.name}."
            )
    return tuple(cast), tuple(notes)


def _more(others: _Kinds) -> str:
    return f" and {len(others) - 1} more" if len(others) > 1 else ""


def _name(kind: torch.dtype) -> str:
    return str(kind).removeprefix("torch.")


def _is_number(kind: torch.dtype) -> bool:
    return kind.is_floating_point or kind.is_complex


def _kinds(source: SourceModel) -> dict[str, torch.dtype]:
    return {name: value.dtype for name, value in source.architecture.shapes.items()}


def _check_kinds(source: SourceModel, built: _Kinds) -> None:
    """Checks that no weight of an architecture is held as whole numbers, nor a real one as complex numbers."""
    for name in source.state.names:
        held = source.state.dtype(name)
        if name in built and built[name].is_floating_point and held.is_complex:
            raise CheckpointError(
                f"'{name}' of {source.name} is complex ({_name(held)}), and the architecture has real numbers there "
                f"({_name(built[name])}). Give the architecture that it was trained with."
            )
        if name in built and _is_number(built[name]) and not _is_number(held):
            raise CheckpointError(
                f"'{name}' of {source.name} holds {_name(held)}, and the architecture has {_name(built[name])} there. "
                "Whole numbers cannot be averaged as weights: if they are quantised, convert the file back to floating "
                "point first."
            )


def _to_cast(state: TensorStore, expected: _Kinds, name: str, first: str) -> dict[str, torch.dtype]:
    """Returns the tensors of a source whose type is not that of the first source → the type to read them in."""
    others: dict[str, torch.dtype] = {}
    for key in state.names:
        held, wanted = state.dtype(key), expected.get(key, state.dtype(key))
        if held == wanted or not (_is_number(held) and _is_number(wanted)):
            continue
        if held.is_complex != wanted.is_complex:
            raise CheckpointError(
                f"'{key}' is {_name(held)} in {name} and {_name(wanted)} in {first}: complex and real weights are not "
                "the same function. Give sources of one architecture."
            )
        others[key] = wanted if wanted.itemsize >= 4 else torch.float32
    return others


def _cast(source: SourceModel, others: _Kinds, built: _Kinds) -> SourceModel:
    own = _kinds(source)
    rebuilt = {name: kind for name, kind in built.items() if _is_number(kind) and own.get(name, kind) != kind}
    make = _making(source.make, rebuilt) if rebuilt else source.make
    if not others and not rebuilt:
        return source
    state = FiniteStore(CastStore(source.state, others, source.name), source.name, OF_A_MODEL)
    return SourceModel(source.name, make, state)


def _making(make: Callable[[], nn.Module], kinds: _Kinds) -> Callable[[], nn.Module]:
    """Returns what builds the same module with some of its tensors in other types."""

    def cast() -> nn.Module:
        model = make()
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if name in kinds:
                tensor.data = tensor.data.to(kinds[name])
        return model

    return cast
