"""Source models: an architecture, a state that is read when needed, and a name for messages."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mergekit_ot.errors import ArchitectureError, CheckpointError


@dataclass(frozen=True)
class SourceModel:
    """One trained network to be fused.

    Attributes:
        name: For messages: a path, or ``source 0``.
        make: Gives a fresh instance of the architecture; never run by the package before it is captured.
        state: Parameters and buffers by name; a mapping that reads from disk is welcome.

    Example:
        >>> source = SourceModel.of(nn.Linear(3, 2), "mine")
        >>> zeros = {name: torch.zeros_like(value) for name, value in source.state.items()}
        >>> source.instance(zeros)(torch.ones(1, 3)).tolist()
        [[0.0, 0.0]]
    """

    name: str
    make: Callable[[], nn.Module]
    state: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module | SourceModel, name: str) -> SourceModel:
        """Returns `model` as a source; a module is copied each time a fresh instance is needed."""
        if isinstance(model, SourceModel):
            return model
        return cls(name, lambda: copy.deepcopy(model), model.state_dict())

    def instance(self, state: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Returns a fresh instance in evaluation mode that holds `state` (the source's own by default).

        Raises:
            ArchitectureError: The state does not fit the architecture.
        """
        model = self.make()
        chosen = dict(self.state if state is None else state)
        if chosen:
            try:
                model.load_state_dict(chosen)
            except RuntimeError as error:
                raise ArchitectureError(
                    f"The state of {self.name} does not fit its architecture: {error}. Check --arch."
                ) from error
        return model.eval()

    def check_state(self) -> None:
        """Checks every key and shape of the state against the architecture, before any work.

        Raises:
            ArchitectureError: Names the first key that is missing, unexpected or of another shape.
            CheckpointError: A tensor holds NaN or infinity.
        """
        expected = self.make().state_dict()
        lacking = [name for name in expected if name not in self.state and not name.endswith("num_batches_tracked")]
        surplus = [name for name in self.state if name not in expected]
        hint = "Is it the architecture that this checkpoint was trained with? Pass the right one with --arch."
        if lacking or surplus:
            what = f"'{lacking[0]}' is missing" if lacking else f"'{surplus[0]}' is not part of the architecture"
            more = len(lacking) + len(surplus) - 1
            others = f" (and {more} more names)" if more else ""
            raise ArchitectureError(f"{self.name} does not fit its architecture: {what}{others}. {hint}")
        for name, tensor in self.state.items():
            if tuple(tensor.shape) != tuple(expected[name].shape):
                raise ArchitectureError(
                    f"{self.name} does not fit its architecture: '{name}' has shape {tuple(tensor.shape)}, "
                    f"the architecture has {tuple(expected[name].shape)}. {hint}"
                )
        for name, tensor in self.state.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise CheckpointError(
                    f"'{name}' of {self.name} holds NaN or infinity, so no neuron of it can be compared. "
                    "Take a checkpoint from before the training diverged."
                )
