"""Runs that a proof compares: fresh instances with random weights, at random inputs, in float64."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from mergekit_ot.graph.capture.capture import prepared
from mergekit_ot.graph.capture.copying import copied
from mergekit_ot.graph.capture.module_state import hidden_tensors
from mergekit_ot.graph.capture.outputs import outputs_of

TOLERANCE = 1e-10
# Some layers compute in float32 whatever they are given (RMSNorm of several libraries): their rounding stays.
UPCAST_TOLERANCE = 1e-5
SENSITIVITY = 20.0
# Large enough to change a number in single precision, small enough for curvature to stay below the tolerance.
_STEP = 1e-8
# How far random weights spread: less where the outputs overflow.
_SPREADS = (1.0, 0.3, 0.1)
# What the error of a kernel that exists in single precision only speaks of.
_SINGLE_ONLY = ("double", "float64", "float32", "dtype")

State = Mapping[str, Tensor]


class Comparison(Protocol):
    """Runs of a model that are compared with each other: what changes their outputs more than rounding does is seen."""

    @property
    def generator(self) -> torch.Generator:
        """Draws the elements that are planted."""
        ...

    @property
    def state(self) -> State:
        """The weights that are compared with."""
        ...

    @property
    def tolerance(self) -> float:
        """What rounding may change."""
        ...

    def change(self, state: State) -> float:
        """Returns the largest relative change of the output when the model holds another state."""
        ...


def run_fresh(
    make: Callable[[], nn.Module], state: State, inputs: Sequence[object], dtype: torch.dtype, calls: int = 1
) -> tuple[list[Tensor], tuple[str, ...]]:
    """Returns the float outputs of every call of a fresh instance, and where it keeps tensors that it had not before.

    Args:
        make: Gives a fresh instance.
        state: What it holds.
        inputs: What it is called with.
        dtype: In which it computes.
        calls: How often it is called.
    """
    model = prepared(in_precision(copied(make()), dtype))
    model.load_state_dict({k: v.clone() for k, v in state.items()}, strict=False)
    given = [x.to(as_precise(x, dtype)) if isinstance(x, Tensor) else x for x in inputs]
    before = hidden_tensors(model)
    outputs = [output for _ in range(calls) for output in outputs_of(model, given)]
    after = hidden_tensors(model)
    return outputs, tuple(where for where in after if after[where] is not before.get(where))


class Proof:
    """Fresh instances, randomised weights and inputs in float64, and the comparisons made with them."""

    def __init__(
        self, make: Callable[[], nn.Module], inputs: tuple[object, ...], seed: int, state: State | None = None
    ) -> None:
        self.make = make
        self.dtype = torch.float64
        self.generator = torch.Generator().manual_seed(seed)
        self.inputs = tuple(self._random_input(x) for x in inputs)
        self.left_behind: tuple[str, ...] = ()
        self.state: State = {}
        self.reference: list[Tensor] = []
        for spread in _SPREADS:
            self.state = self._random_state(spread) if state is None else state
            self.reference = self._first_run()
            if state is not None or all(bool(torch.isfinite(x).all()) for x in self.reference):
                break
        self.scale = scale_of(self.reference)
        self.noise = self._distance(self.run(self.state))
        self.tolerance = TOLERANCE if self._is_double() else UPCAST_TOLERANCE

    def at_other_shapes(self) -> list[Proof]:
        """Returns the same proof at a larger batch, and at the first longer axis that the model accepts.

        A table traced at one length, or a shape baked into the graph, holds at the traced shape only. The longer axis
        is more than doubled where the model allows it.
        """
        ranks = [value.ndim for value in self.inputs if isinstance(value, Tensor)]
        rank = min(ranks, default=0)
        batch = self._longer_by(0, is_doubled=False) if rank > 0 else None
        for axis in range(1, rank):
            longer = self._longer_by(axis, is_doubled=True) or self._longer_by(axis, is_doubled=False)
            if longer is not None:
                return [proof for proof in (batch, longer) if proof is not None]
        return [] if batch is None else [batch]

    def _longer_by(self, axis: int, is_doubled: bool) -> Proof | None:
        inputs = tuple(longer(x, axis, is_doubled) if isinstance(x, Tensor) else x for x in self.inputs)
        try:
            return Proof(self.make, inputs, 1, self.state)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
            return None

    def of(self, state: State) -> Proof:
        """Returns the proof with another state, at the same inputs."""
        return Proof(self.make, self.inputs, 1, state)

    def again(self) -> Proof:
        """Returns the proof with other random weights and inputs: what one input does not show, another may."""
        return Proof(self.make, self.inputs, 2)

    def _random_input(self, value: object) -> object:
        if isinstance(value, Tensor) and _is_number(value):
            return torch.randn(value.shape, generator=self.generator, dtype=as_precise(value, torch.float64))
        return value

    def _first_run(self) -> list[Tensor]:
        try:
            return self.run(self.state)
        except (RuntimeError, ValueError) as error:
            if self.dtype is torch.float32 or not any(word in str(error).lower() for word in _SINGLE_ONLY):
                raise
            # A forward that makes tensors of a fixed type, or calls a kernel of one, cannot run in another.
            self.dtype = torch.float32
            return self.run(self.state)

    def _random_state(self, spread: float) -> dict[str, Tensor]:
        state = {}
        for name, tensor in self.make().state_dict().items():
            if not _is_number(tensor):
                state[name] = tensor.clone()
                continue
            kind = as_precise(tensor, torch.float64)
            noise = spread * torch.randn(tensor.shape, generator=self.generator, dtype=kind)
            fan_in = max(tensor[0].numel(), 1) if tensor.ndim > 1 else 1
            # Variances must stay positive, and gains near one keep deep nets from exploding.
            if name.endswith("running_var"):
                state[name] = 0.5 + noise.abs()
            else:
                state[name] = noise / fan_in**0.5 if tensor.ndim > 1 else 0.5 * noise + (1.0 if "weight" in name else 0)
        return state

    def run(self, state: State) -> list[Tensor]:
        """Returns the float outputs of a fresh instance that holds `state`."""
        outputs, self.left_behind = run_fresh(self.make, state, self.inputs, self.dtype)
        return outputs

    def _is_double(self) -> bool:
        """Whether the model computes in float64 throughout.

        A smooth function is straight over a small enough step; one that rounds to single precision on the way is not.
        """
        if self.dtype is not torch.float64:
            return False
        generator = torch.Generator().manual_seed(1)
        ways = {
            k: v * torch.randn(v.shape, generator=generator, dtype=as_precise(v, torch.float64))
            if _is_number(v)
            else None
            for k, v in self.state.items()
        }

        def moved(step: float) -> list[Tensor]:
            return self.run({k: v if (way := ways[k]) is None else v + step * way for k, v in self.state.items()})

        pairs = zip(moved(_STEP), moved(2 * _STEP), self.reference, strict=True)
        bends = [
            float((twice - 2 * once + here).abs().max()) / self.scale for once, twice, here in pairs if here.numel()
        ]
        return max(bends, default=0.0) < TOLERANCE

    @property
    def is_repeatable(self) -> bool:
        """Whether two runs of the same weights on the same inputs are the same."""
        return self.noise <= self.tolerance

    @property
    def threshold(self) -> float:
        """What a change of the output must pass to show that something depends on it."""
        return SENSITIVITY * max(self.noise, self.tolerance)

    def _distance(self, outputs: list[Tensor]) -> float:
        return distance(outputs, self.reference, self.scale)

    def change(self, state: State) -> float:
        """Returns the largest relative change of the output when the model holds `state` instead of its own."""
        return self._distance(self.run(state))


def scale_of(outputs: Sequence[Tensor]) -> float:
    """Returns the largest number in outputs; one where there is none."""
    return max((float(x.abs().max()) for x in outputs if x.numel()), default=1.0) or 1.0


def distance(outputs: Sequence[Tensor], others: Sequence[Tensor], scale: float) -> float:
    """Returns the largest difference of outputs, relative to a scale; infinity where it is no number."""
    pairs = zip(outputs, others, strict=True)
    found = max((float((a - b).abs().max()) / scale for a, b in pairs if a.numel()), default=0.0)
    return found if found == found else float("inf")


def longer(tensor: Tensor, axis: int, is_doubled: bool) -> Tensor:
    """Returns the tensor with more entries along an axis, the same as its last: two, or twice as many and two."""
    more = tensor.shape[axis] + 2 if is_doubled else 2
    last = tensor.narrow(axis, tensor.shape[axis] - 1, 1)
    return torch.cat([tensor, *([last] * more)], axis)


def _is_number(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()


def as_precise(value: Tensor, kind: torch.dtype) -> torch.dtype:
    """Returns the type that a tensor takes where all computes in `kind`: complex numbers and integers stay so."""
    if value.is_complex():
        return torch.complex128 if kind is torch.float64 else torch.complex64
    return kind if value.is_floating_point() else value.dtype


def in_precision(model: nn.Module, kind: torch.dtype) -> nn.Module:
    """Returns the module with all its numbers in `kind`; complex ones stay complex."""
    complex_ones = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_complex()]
    kept = [tensor.detach().to(as_precise(tensor, kind)) for tensor in complex_ones]
    model = model.double() if kind is torch.float64 else model.float()
    for tensor, value in zip(complex_ones, kept, strict=True):
        tensor.data = value
    return model
