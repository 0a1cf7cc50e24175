"""Networks are run with one state after the other, repeatably, and their outputs compared."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.graph.capture.module_state import hidden_tensors
from mergekit_ot.graph.capture.outputs import outputs_of, same_draws

State = Mapping[str, Tensor]
Inputs = tuple[object, ...]
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Noise:
    """What a network's outputs differ by although its function is the same.

    Attributes:
        rounding: When its weights are moved by one rounding.
        chance: Between two runs of one state, with one seed and with another.
        error_in_double: What is left of the error when all is computed in double precision; infinite where the network
            cannot be run so.
    """

    rounding: float
    chance: float
    error_in_double: float


class Runner:
    """Runs a network with one state after the other.

    The module is built once, and again only where a forward left something in it that the next would see.

    Args:
        model: Gives the module.
        inputs: What it is run with.
    """

    def __init__(self, model: SourceModel, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self._module: nn.Module | None = None

    def outputs(self, state: State, seed: int = 0) -> list[Tensor]:
        """Returns the float outputs of the module that holds a state, in double precision."""
        if self._module is None:
            self._module = self.model.instance(state)
        else:
            self._module.load_state_dict(dict(state), strict=False)  # counters of BatchNorm may be missing
        before = _left_in(self._module)
        found = outputs_of(self._module, self.inputs, seed)
        if before != _left_in(self._module):
            self._module = None
        return found

    def noise(self, state: State, other: Runner, moved: State) -> Noise:
        """Returns what the network differs by from itself, and in double precision from another with another state."""
        outputs, double = self.outputs(state), self._in_double(state)
        run = self.outputs if double is None else self._in_double
        # In double precision, what is rounded to single precision on the way still shows.
        rounded = {key: _rounded(value, is_single=double is not None) for key, value in state.items()}
        return Noise(
            rounding=difference(outputs if double is None else double, run(rounded)),
            # A forward may draw from generators that no seed here reaches.
            chance=max(difference(outputs, self.outputs(state, seed)) for seed in (0, 1)),
            error_in_double=difference(double, other._in_double(moved)),
        )

    def _in_double(self, state: State) -> list[Tensor] | None:
        inputs = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in self.inputs)
        try:
            module = self.model.instance(state).double()
            # Loaded once more, since the instance rounded it to its own type.
            module.load_state_dict(dict(state), strict=False)
            return outputs_of(module, inputs, 0)
        except (RuntimeError, ValueError, TypeError):
            return None  # a forward that fixes its types cannot be run in another


@contextlib.contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Runs a block without gradients and with seeded random numbers, and gives the caller's back afterwards."""
    with same_draws(seed), torch.no_grad():
        yield


def _left_in(module: nn.Module) -> dict[str, object]:
    """Returns what a module holds besides its state: hidden tensors, buffers outside the state, plain values."""
    held: dict[str, object] = {where: id(tensor) for where, tensor in hidden_tensors(module).items()}
    kept = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name not in kept:
            held[name] = (id(buffer), buffer._version)
    for path, inner in module.named_modules():
        held |= {f"{path}.{name}": value for name, value in vars(inner).items() if isinstance(value, _PLAIN)}
    return held


def _rounded(tensor: Tensor, is_single: bool) -> Tensor:
    """Returns a tensor moved by one rounding, up or down: of its own type, or of single precision."""
    if not tensor.is_floating_point():
        return tensor
    signs = torch.randint(0, 2, tensor.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moved = tensor.double() * (1 + signs * torch.finfo(torch.float32 if is_single else tensor.dtype).eps)
    return moved if is_single else moved.to(tensor.dtype)


def difference(ours: Sequence[Tensor] | None, theirs: Sequence[Tensor] | None) -> float:
    """Returns the largest difference between outputs, relative to the scale of each; infinite where one is odd.

    Numbers that are NaN or infinite in both, in the same way, are the same.
    """
    if ours is None or theirs is None or len(ours) != len(theirs):
        return float("inf")
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if one.shape != other.shape:
            return float("inf")
        is_same = (one == other) | (one.isnan() & other.isnan())
        apart = torch.where(is_same, torch.zeros_like(one), (one - other).abs())
        finite = one[one.isfinite()].abs()
        scale = (float(finite.max()) if finite.numel() else 0.0) or 1.0
        found = float(apart.max()) / scale if apart.numel() else 0.0
        worst = max(worst, found if found == found else float("inf"))
    return worst
