"""The architecture of a network: its names and shapes are looked up once, and it is built as rarely as possible."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import final

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from mergekit_ot.graph.capture.module_state import tied_names
from mergekit_ot.storage.fitting import Ties

# A larger instance is built anew when it is needed, instead of being kept while neurons are coupled.
_KEPT_BYTES = 128 << 20


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """Returns a fresh instance on the meta device, or a real one where the constructor needs real tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return make()
        except Exception as failure:
            # What is too large without memory is too large with it, and would be filled until there is none left.
            if "overflow" in str(failure).lower() or "too large" in str(failure).lower():
                raise
            return make()


def shapes_of(model: nn.Module) -> dict[str, Tensor]:
    """Returns the state dict of a module without memory for its tensors; those of lazy modules are as they are."""
    return {
        # Of a like tensor, torch would ask for strides, and import what works out symbolic ones.
        name: value if is_lazy(value) else torch.empty(value.shape, dtype=value.dtype, device="meta")
        for name, value in model.state_dict().items()
        if isinstance(value, Tensor)
    }


@final
class KnownArchitecture:
    """What builds a network, with what is known of it: looked up once, on an instance without memory where possible.

    It is called like any function that builds the network, and gives an instance that nobody has each time.

    Args:
        make: Gives a fresh instance of the architecture.
        prototype: An instance that is never run and whose names and shapes count, where there is one already.

    Example:
        >>> built = []
        >>> architecture = KnownArchitecture(lambda: built.append(1) or nn.Linear(3, 2))
        >>> dict.fromkeys(architecture.shapes), architecture.shapes["bias"].is_meta, len(built)
        ({'weight': None, 'bias': None}, True, 1)
        >>> architecture.shapes is architecture.shapes, len(built)
        (True, 1)
    """

    def __init__(self, make: Callable[[], nn.Module], prototype: nn.Module | None = None) -> None:
        self._make, self._outline = make, prototype
        self._shapes: Mapping[str, Tensor] | None = None
        self._ties: Ties | None = None
        self._unused: nn.Module | None = None

    def __call__(self) -> nn.Module:
        """Returns a fresh instance: one that was built for its shapes or values and never run, or a new one."""
        unused, self._unused = self._unused, None
        if unused is not None and unused is self._outline:
            self._outline = None  # whoever has it may run it
        return self._make() if unused is None else unused

    def built(self) -> nn.Module:
        """Returns a new instance, whatever was built before."""
        return self._make()

    @property
    def outline(self) -> nn.Module:
        """An instance that must not be run or changed; its tensors are on the meta device where that is possible."""
        if self._outline is None:
            self._outline = on_meta(self._make)
            if self.is_real and self._unused is None:
                self._unused = self._outline
        return self._outline

    @property
    def shapes(self) -> Mapping[str, Tensor]:
        """Name → tensor of the state dict, on the meta device."""
        if self._shapes is None:
            self._shapes = shapes_of(self.outline)
        return self._shapes

    @property
    def ties(self) -> Ties:
        """Name → all names of the same tensor, for tensors that have several: a file may hold them under one only."""
        if self._ties is None:
            classes: dict[str, list[str]] = {}
            for name, first in tied_names(self.outline).items():
                classes.setdefault(first, [first]).append(name)
            self._ties = {name: tuple(names) for names in classes.values() for name in names}
        return self._ties

    @property
    def is_lazy(self) -> bool:
        """Whether some of its tensors have no shape before it is run."""
        return any(map(is_lazy, self.shapes.values()))

    @property
    def is_real(self) -> bool:
        """Whether the outline has values: the constructor needs them, or an instance was given."""
        outline = self.outline if self._outline is None else self._outline
        return not any(tensor.is_meta for tensor in (*outline.parameters(), *outline.buffers()))

    def initial_state(self) -> dict[str, Tensor]:
        """Returns the state dict of a fresh instance, with its values."""
        if self._unused is None:
            self._unused = self._make()
        return {name: value for name, value in self._unused.state_dict().items() if isinstance(value, Tensor)}

    def give_back(self, model: nn.Module) -> None:
        """Takes an instance that nobody has changed or run, to be handed out next; a large one is let go."""
        if sum(value.nbytes for value in shapes_of(model).values() if not is_lazy(value)) <= _KEPT_BYTES:
            self._unused = model


def with_known(make: Callable[[], nn.Module], known: dict[int, KnownArchitecture]) -> KnownArchitecture:
    """Returns the architecture that a function builds; the same for the same function.

    Args:
        make: The function.
        known: Those that are known, by the identity of their functions; it is added to.
    """
    if isinstance(make, KnownArchitecture):
        return make
    return known.setdefault(id(make), KnownArchitecture(make))
