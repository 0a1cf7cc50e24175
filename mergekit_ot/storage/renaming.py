"""Under which names a file has the tensors of an architecture: behind a prefix, inside wrappers, or by place."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from mergekit_ot.storage.fitting import Ties, is_optional
from mergekit_ot.storage.store import TensorStore

# Parts of names that belong to what is wrapped around a module, the surest first.
_WRAPPERS = (
    frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}),
    frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}),
)
_ENDS = (".", "/", ":", "_")
# What the parts of a prefix that were taken off all names already may be.
_TAKEN = ("module.", "_orig_mod.")


@final
@dataclass(frozen=True)
class Renaming:
    """Names of an architecture and those under which a file has them.

    Attributes:
        held: Name of the architecture → name in the file.
        prefix: What stands before every name in the file.
        wrappers: Parts inside of names that were taken out.
        is_by_place: Whether the file has no names, and its tensors are taken in the architecture's order.
    """

    held: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    wrappers: tuple[str, ...] = ()
    is_by_place: bool = False

    @property
    def sentence(self) -> str:
        """What was done to the names, as a sentence; empty where nothing was."""
        if self.is_by_place:
            return f"{len(self.held)} tensors without names, taken in the order of the architecture's state dict"
        taken = [f"the prefix '{self.prefix}'"] if self.prefix else []
        taken += [f"'{wrapper}.'" for wrapper in self.wrappers]
        return f"{' and '.join(taken)} taken off the names" if taken else ""


@final
class RenamedStore(TensorStore):
    """A store under other names, without what has none.

    Args:
        store: Gives the tensors.
        held: Name → name in the store.

    Example:
        >>> from mergekit_ot.storage.store import MemoryStore
        >>> store = RenamedStore(MemoryStore({"model.bias": torch.ones(2)}), {"bias": "model.bias"})
        >>> list(store), store["bias"].tolist()
        (['bias'], [1.0, 1.0])
    """

    def __init__(self, store: TensorStore, held: Mapping[str, str]) -> None:
        self.store, self._held = store, dict(held)

    @property
    def names(self) -> Collection[str]:
        """Names of the tensors."""
        return self._held.keys()

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a tensor."""
        return self.store.shape(self._held[name])

    def dtype(self, name: str) -> torch.dtype:
        """Returns the type of a tensor's entries."""
        return self.store.dtype(self._held[name])

    def read(self, name: str) -> Tensor:
        """Returns a tensor."""
        return self.store.read(self._held[name])

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Returns a part of a tensor."""
        return self.store.slice(self._held[name], start, stop)

    def digest(self) -> str:
        """Returns the SHA-256 of the file."""
        return self.store.digest()

    def close(self) -> None:
        """Closes the store that gives the tensors."""
        self.store.close()
        self._held = {}


def renamings(names: Collection[str], expected: Mapping[str, Tensor], ties: Ties) -> list[Renaming]:
    """Returns the ways to take the names of an architecture from those of a file; none where there is no such way.

    Args:
        names: The names in the file.
        expected: State dict of a fresh instance.
        ties: Name → all names under which the architecture has the same tensor; one of them is enough.

    Example:
        >>> state = {name: torch.zeros(1) for name in ("weight", "bias")}
        >>> [way.prefix for way in renamings(["ema.weight", "ema.bias", "net.weight", "net.bias"], state, {})]
        ['ema.', 'net.']
    """
    if are_places(names):
        return _by_place(names, expected)
    for wrappers in (frozenset(), *_WRAPPERS):
        unwrapped, taken = _without(names, wrappers)
        if unwrapped is not None and (taken or not wrappers):
            found = [
                Renaming(_taken(unwrapped, expected, prefix), prefix, tuple(sorted(taken)))
                for prefix in _prefixes(unwrapped, expected, ties)
            ]
            if found:
                return found
    return []


def behind_prefix(names: Collection[str], prefix: str) -> dict[str, str]:
    """Returns name without a prefix → name, for the names that begin with it; it may stand there in part only.

    Example:
        >>> behind_prefix(["model.bias", "loss.weight"], "module.model")
        {'bias': 'model.bias'}
    """
    begun = prefix
    while True:
        for start in (begun, f"{begun}."):
            # A prefix without a point at its end is one of whole parts of names.
            if start.endswith(_ENDS) and any(name.startswith(start) for name in names):
                return {name[len(start) :]: name for name in names if name.startswith(start)}
        shorter = next((begun.removeprefix(part) for part in _TAKEN if begun.startswith(part)), begun)
        if shorter in ("", begun):
            return {}
        begun = shorter


def are_places(names: Collection[str]) -> bool:
    """Returns whether names are those that NumPy gives to arrays without names."""
    return len(names) > 0 and all(name == f"arr_{place}" for place, name in enumerate(names))


def _by_place(names: Collection[str], expected: Mapping[str, Tensor]) -> list[Renaming]:
    counted = [name for name in expected if not is_optional(name)]
    for wanted in (list(expected), counted):
        if len(wanted) == len(names):
            return [Renaming(dict(zip(wanted, names, strict=True)), is_by_place=True)]
    return []


def _without(names: Collection[str], wrappers: frozenset[str]) -> tuple[dict[str, str] | None, set[str]]:
    """Returns name without parts that are wrappers → name, with the parts; None where two names would be one."""
    unwrapped: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        parts = name.split(".") if wrappers else [name]
        taken.update(wrappers.intersection(parts))
        short = ".".join(part for part in parts if part not in wrappers)
        if short in unwrapped:
            return None, set()
        unwrapped[short] = name
    return unwrapped, taken


def _prefixes(names: Mapping[str, str], expected: Mapping[str, Tensor], ties: Ties) -> list[str]:
    """Returns the prefixes, none included, behind which all names of an architecture are in a file."""
    required = {name: (name, *ties.get(name, ())) for name in expected if not is_optional(name)}
    if not required:
        return []
    # The longest name stands in the fewest places.
    anchor = max(required, key=len)
    return [prefix for prefix in _begun(names, required[anchor]) if _has_all(names, prefix, required)]


def _begun(names: Mapping[str, str], ends: tuple[str, ...]) -> Iterator[str]:
    begun = (name[: len(name) - len(end)] for name in names for end in ends if name.endswith(end))
    return iter(dict.fromkeys(prefix for prefix in begun if not prefix or prefix.endswith(_ENDS)))


def _has_all(names: Mapping[str, str], prefix: str, required: Mapping[str, tuple[str, ...]]) -> bool:
    return all(any(prefix + name in names for name in tied) for tied in required.values())


def _taken(names: Mapping[str, str], expected: Mapping[str, Tensor], prefix: str) -> dict[str, str]:
    return {name: names[prefix + name] for name in expected if prefix + name in names}
