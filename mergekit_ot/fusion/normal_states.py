"""States rewritten into their normal form, a tensor when it is asked for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from mergekit_ot.graph.normal_form.form import NormalForm
from mergekit_ot.storage.store import TensorStore, as_store, tensors_digest


@dataclass(frozen=True)
class NormalStates:
    """How states are rewritten: into a normal form, with tied weights as separate tensors.

    Attributes:
        form: The normal form.
        aliases: Further name of a tied weight → the name that it is tied to, for those that become separate.

    Example:
        >>> states = NormalStates(NormalForm((), (), {}, frozenset()), {"head.weight": "table.weight"})
        >>> list(states.store({"table.weight": torch.ones(2, 3)}))
        ['table.weight', 'head.weight']
    """

    form: NormalForm
    aliases: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_telling(self) -> bool:
        """Whether a state is changed at all."""
        return bool(self.form.rewrites) or bool(self.aliases)

    def store(self, state: Mapping[str, Tensor]) -> NormalStore:
        """Returns a state in normal form.

        Args:
            state: A state of the network as it is; it may lack further names of tied weights.
        """
        return NormalStore(as_store(state), self)


@final
class NormalStore(TensorStore):
    """A state in normal form: every tensor is rewritten when it is read.

    Args:
        state: The state.
        states: How it is rewritten.
    """

    def __init__(self, state: TensorStore, states: NormalStates) -> None:
        self.state, self.states = state, states
        self._names = list(dict.fromkeys([*state.names, *states.aliases]))

    @property
    def names(self) -> Collection[str]:
        """Names of the tensors, in order."""
        return dict.fromkeys(self._names)

    def shape(self, name: str) -> torch.Size:
        """Returns the shape of a tensor."""
        return self.state.shape(self._held(name))

    def dtype(self, name: str) -> torch.dtype:
        """Returns the type of a tensor's entries."""
        return self.state.dtype(self._held(name))

    def read(self, name: str) -> Tensor:
        """Returns a tensor in normal form."""
        return self.states.form.tensor(name, lambda other: self.state.read(self._held(other)))

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        """Returns the entries of a tensor along its first axis; the whole tensor is rewritten for it."""
        return self.read(name)[start:stop]

    def digest(self) -> str:
        """Returns the SHA-256 of names, types, shapes and entries."""
        return tensors_digest(self)

    def close(self) -> None:
        """Lets go of the state."""
        self.state.close()

    def _held(self, name: str) -> str:
        return name if name in self.state else self.states.aliases.get(name, name)
