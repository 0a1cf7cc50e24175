"""Source models: an architecture, a state that is read when needed, and a name for messages."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from mergekit_ot.errors import ArchitectureError
from mergekit_ot.fusion.architecture import KnownArchitecture
from mergekit_ot.graph.capture.copying import copied, making_shaped, uninitialised_names
from mergekit_ot.storage.finite import OF_A_MODEL, FiniteStore
from mergekit_ot.storage.fitting import FittedStore, Misfit, filled_names, misfit
from mergekit_ot.storage.store import TensorStore, as_store


@dataclass(frozen=True, init=False)
class SourceModel:
    """One trained network to be fused.

    Attributes:
        name: For messages: a path, or ``source 0``.
        make: Gives a fresh instance of the architecture; never run by the package before it is captured.
        state: Parameters and buffers by name (a `TensorStore`, which is a mapping too); a plain mapping may be given.
            A tensor that holds NaN or infinity is refused when it is first read.
        architecture: What `make` builds, with its names and shapes.

    Example:
        >>> import torch
        >>> source = SourceModel.of(nn.Linear(3, 2), "mine")
        >>> zeros = {name: torch.zeros_like(value) for name, value in source.state.items()}
        >>> source.instance(zeros)(torch.ones(1, 3)).tolist()
        [[0.0, 0.0]]
    """

    name: str
    make: Callable[[], nn.Module]
    state: FiniteStore
    architecture: KnownArchitecture = field(repr=False, compare=False)

    def __init__(
        self, name: str, make: Callable[[], nn.Module], state: Mapping[str, Tensor] = types.MappingProxyType({})
    ) -> None:
        checked = state if isinstance(state, FiniteStore) else FiniteStore(as_store(state), name, OF_A_MODEL)
        known = make if isinstance(make, KnownArchitecture) else KnownArchitecture(make)
        for attribute, value in (("name", name), ("make", make), ("state", checked), ("architecture", known)):
            object.__setattr__(self, attribute, value)  # the class is frozen

    @classmethod
    def of(cls, model: nn.Module | SourceModel, name: str) -> SourceModel:
        """Returns `model` as a source; a module is copied each time a fresh instance is needed.

        Raises:
            ArchitectureError: It is no module, or a lazy one that has no weights yet.
        """
        if isinstance(model, SourceModel):
            return model
        if not isinstance(model, nn.Module):
            raise ArchitectureError(
                f"{name} is a {type(model).__name__}, which does not say what it computes. Pass the module with its "
                "weights loaded, or SourceModel(name, make, state); files are fused by 'mergeot fuse'."
            )
        lazy = uninitialised_names(model)
        if lazy:
            raise ArchitectureError(
                f"'{lazy[0]}' of {name} has no shape yet: the module is lazy and was never run, so it has no "
                "weights. Load its state, or call it once on an input."
            )
        return cls(name, KnownArchitecture(lambda: copied(model), prototype=model), model.state_dict())

    def of_known(self, architecture: KnownArchitecture) -> SourceModel:
        """Returns the source with an architecture of which more may be known: the one that `make` builds.

        Tied tensors that the state holds under one of their names stand in it under all of them.
        """
        held, ties = self.state, architecture.ties
        if held and filled_names(held, architecture.shapes, ties) and misfit(held, architecture.shapes, ties) is None:
            filled = FiniteStore(FittedStore(held, architecture.shapes, ties), self.name, OF_A_MODEL)
            return SourceModel(self.name, architecture, filled)
        return self if architecture is self.make else SourceModel(self.name, architecture, self.state)

    def instance(self, state: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Returns a fresh instance in evaluation mode that holds `state` (the source's own by default).

        Raises:
            ArchitectureError: The state does not fit the architecture.
        """
        model = self.architecture()
        chosen = self.state if state is None else as_store(state)
        if chosen:
            self.check_fit(chosen)
            model.load_state_dict(dict(chosen), strict=False)  # counters of BatchNorm may be missing
        return model.eval()

    def shaped(self, inputs: tuple[object, ...]) -> SourceModel:
        """Returns the source with its lazy modules in the shapes that inputs give them."""
        if not self.architecture.is_lazy:
            return self
        return SourceModel(self.name, making_shaped(self.make, inputs), self.state)

    def check_state(self) -> None:
        """Checks every name and shape of the state against the architecture, before any work; no file is read.

        Raises:
            ArchitectureError: Names the first key that is missing, unexpected or of another shape.
            CheckpointError: A tensor of a state in memory holds NaN or infinity.
        """
        self.check_fit(self.state)
        self.state.check_in_memory()

    def check_fit(self, state: TensorStore) -> None:
        """Checks every name and shape of a state against the architecture.

        Raises:
            ArchitectureError: Names the first key that is missing, unexpected or of another shape.
        """
        difference = misfit(state, self.architecture.shapes, self.architecture.ties)
        # What holds no weights is told with its number type, where the sources' types are compared.
        if difference is not None and difference.retyped is None:
            raise ArchitectureError(
                f"{self.name} does not fit its architecture: {_difference_text(difference)}. Is it the architecture "
                "that this checkpoint was trained with? Pass the right one with --arch."
            )


def _difference_text(difference: Misfit) -> str:
    shape = difference.reshaped
    if shape is not None:
        return f"'{shape.name}' has shape {tuple(shape.held)}, the architecture has {tuple(shape.expected)}"
    missing, unexpected = difference.missing, difference.unexpected
    what = f"'{missing[0]}' is missing" if missing else f"'{unexpected[0]}' is not part of the architecture"
    more = len(missing) + len(unexpected) - 1
    return what + (f" (and {more} more names)" if more else "")
