"""What is written is checked first: names, shapes, types and finite numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from mergekit_ot.errors import CheckpointError, ResultError
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.storage.finite import check_finite
from mergekit_ot.storage.store import StoreWriter, TensorStore

# A counter of BatchNorm, which older files lack.
_OPTIONAL = "num_batches_tracked"


def template_of(target: SourceModel, sources: Iterable[SourceModel]) -> dict[str, Tensor]:
    """Returns the state dict of a fresh instance, its tensors on the meta device where every source has such a one."""
    states, shapes = [source.state for source in sources], target.architecture.shapes
    lacking = [
        name
        for name, tensor in shapes.items()
        if not all(name in state and state.shape(name) == tensor.shape for state in states)
    ]
    initial = target.architecture.initial_state() if lacking else {}
    # The instance that gives them may be loaded with another state later.
    return {**shapes, **{name: initial[name].detach().clone() for name in lacking}}


@dataclass(frozen=True)
class ResultCheck:
    """What a state must be in order to be written.

    Attributes:
        template: State dict of the fused architecture; its tensors may be on the meta device.
        sources: Whose types the tensors may have; what is not finite in one of them need not be finite here.
        maker: Who made the state, for the message.
    """

    template: Mapping[str, Tensor]
    sources: tuple[SourceModel, ...]
    maker: str

    def state(self, state: Mapping[str, Tensor]) -> None:
        """Checks a whole state.

        Raises:
            ResultError: A name is missing or unknown, or a tensor has another shape or type, or is not finite.
        """
        for name, tensor in state.items():
            self.tensor(name, tensor)
        self.names(state)

    def names(self, written: Iterable[str]) -> None:
        """Checks that nothing is missing.

        Raises:
            ResultError: Something is.
        """
        held = set(written)
        missing = [name for name in self.template if name not in held and not name.endswith(_OPTIONAL)]
        if missing:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise self._refused(f"'{missing[0]}' is missing{more}")

    def tensor(self, name: str, tensor: Tensor) -> None:
        """Checks one tensor.

        Raises:
            ResultError: The architecture has none of that name, or one of another shape or type, or it is not finite.
        """
        if name not in self.template:
            raise self._refused(f"'{name}' is not part of the architecture")
        if not isinstance(tensor, Tensor):
            raise self._refused(f"'{name}' is a {type(tensor).__name__} and no tensor")
        expected = self.template[name]
        if tensor.shape != expected.shape:
            raise self._refused(
                f"'{name}' has shape {tuple(tensor.shape)}, the architecture has {tuple(expected.shape)}"
            )
        types = {expected.dtype, *(source.state.dtype(name) for source in self.sources if name in source.state)}
        if tensor.dtype not in types:
            known = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in types))
            raise self._refused(
                f"'{name}' is {str(tensor.dtype).removeprefix('torch.')} where the sources have {known}"
            )
        if not _is_finite(name, tensor) and all(_is_finite(name, held) for held in self._originals(name)):
            bad = int((~torch.isfinite(tensor)).sum())
            raise self._refused(
                f"{bad} of {tensor.numel()} entries of '{name}' are NaN or infinite, though the sources' are finite"
            )

    def _originals(self, name: str) -> Iterable[Tensor]:
        if not self.template[name].is_meta:
            yield self.template[name]
        for source in self.sources:
            if name in source.state:
                yield source.state.read(name)

    def _refused(self, what: str) -> ResultError:
        return ResultError(
            f"What {self.maker} made is no state of the architecture: {what}. Nothing was written. Look at what it was "
            "given (its options, the calibration data: one NaN is enough), or choose another."
        )


def _is_finite(name: str, tensor: Tensor) -> bool:
    try:
        check_finite({name: tensor}, "")
    except CheckpointError:
        return False
    return True


@final
class CheckedWriter(StoreWriter):
    """Hands tensors on to a writer, each after it was checked.

    Args:
        writer: Takes the tensors.
        check: What they must be.
    """

    def __init__(self, writer: StoreWriter, check: ResultCheck) -> None:
        self.writer, self.check = writer, check
        self._written: set[str] = set()

    def write(self, name: str, tensor: Tensor) -> None:
        """Checks a tensor and hands it on.

        Raises:
            ResultError: It must not be written.
        """
        self.check.tensor(name, tensor)
        self._written.add(name)
        self.writer.write(name, tensor)

    def close(self) -> None:
        """Finishes, if nothing is missing.

        Raises:
            ResultError: Something is.
        """
        self.check.names(self._written)
        self.writer.close()

    def reopened(self) -> TensorStore:
        """Returns a store of what was written."""
        return self.writer.reopened()
