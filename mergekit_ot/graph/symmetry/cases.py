"""Cases that a trace did not record: other sizes, values and types, and calls after the first."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor, fx

from mergekit_ot.graph.capture.outputs import float_outputs
from mergekit_ot.graph.capture.program import USER_OUTPUT, CapturedProgram
from mergekit_ot.graph.capture.questions import Branch, Case
from mergekit_ot.graph.symmetry.proof import Proof, State, distance, run_fresh, scale_of

# What an instance is called in most checks, and at most where its code counts calls.
_CALLS, _MOST_CALLS = 2, 20
# How many sizes are tried, and how large an input may become.
_MOST_SIZES, _MOST_NUMBERS = 24, 1 << 22
_LARGEST_SIZE = 4096
# How far a function may change in single precision; more only where rounding alone changes it as much.
_SINGLE_TOLERANCE = 1e-3
_ROUNDING, _MARGIN = 1e-7, 20.0
# What a forward raises that does not take a case.
REFUSED = (RuntimeError, ValueError, IndexError, TypeError, AssertionError, KeyError)


class OtherCase:
    """The function in a case that the trace did not record.

    Args:
        name: What the case is, for the reason of a pin.
        proof: Whose weights are taken, and whose inputs where no others are given.
        inputs: What the model is called with.
        dtype: In which it computes; that of the proof where left out.
        calls: How often an instance is called; all its outputs are compared.

    Raises:
        RuntimeError: The model does not take this case, or its output is no number. So do other errors of its forward.
    """

    def __init__(
        self,
        name: str,
        proof: Proof,
        inputs: Sequence[object] | None = None,
        dtype: torch.dtype | None = None,
        calls: int = 1,
    ) -> None:
        self.name = name
        self.make, self.state = proof.make, proof.state
        # Its own, so that what the proof itself draws does not depend on how many cases there are.
        self.generator = torch.Generator().manual_seed(3)
        self.inputs = proof.inputs if inputs is None else inputs
        self.dtype = dtype or proof.dtype
        self.calls = calls
        self._tolerance = proof.tolerance
        self.reference = self._run(self.state)
        if not all(bool(torch.isfinite(x).all()) for x in self.reference):
            raise RuntimeError("the output is no number")
        self.scale = scale_of(self.reference)

    def _run(self, state: State) -> list[Tensor]:
        return run_fresh(self.make, state, self.inputs, self.dtype, self.calls)[0]

    @property
    def tolerance(self) -> float:
        """What rounding may change."""
        return self._allowed

    @cached_property
    def _allowed(self) -> float:
        """What rounding may change: in single precision, as much as changes of the weights by rounding do."""
        if self.dtype is torch.float64:
            return self._tolerance
        generator = torch.Generator().manual_seed(1)
        rounded = {
            name: value * (1 + _ROUNDING * torch.randn(value.shape, generator=generator, dtype=torch.float64))
            if value.is_floating_point()
            else value
            for name, value in self.state.items()
        }
        return max(_SINGLE_TOLERANCE, _MARGIN * self.change(rounded))

    def change(self, state: State) -> float:
        """Returns the largest relative change of the outputs when the model holds another state."""
        return distance(self._run(state), self.reference, self.scale)


def other_cases(proof: Proof, branches: Sequence[Branch]) -> Iterator[OtherCase]:
    """Yields the cases that a model takes: always some, and on both sides of what its code asks.

    Args:
        proof: Runs of the case that was traced.
        branches: Questions in the code, with the numbers that they compare with.
    """
    numbers = {case: _numbers(branches, case) for case in Case}
    calls = [int(number) + 2 for number in numbers.get(Case.STATE, ()) if number < _MOST_CALLS - 1]
    single = torch.float32 if proof.dtype is torch.float64 else proof.dtype
    count = max([_CALLS, *calls])
    name = f"in single precision or in {count} calls of one instance"
    yield from _taken(lambda: OtherCase(name, proof, dtype=single, calls=count))
    sizes = {(0, 1), *_sizes(proof.inputs, numbers[Case.SIZE])}
    inputs = {f"at {size} on axis {axis}": _resized(proof.inputs, axis, size) for axis, size in sorted(sizes)}
    if any(branch.case is Case.VALUE for branch in branches):
        inputs |= _at_values(proof.inputs, numbers[Case.VALUE])
    for name, given in inputs.items():
        if given is not None:
            yield from _taken(lambda which=name, chosen=given: OtherCase(which, proof, chosen))


def recorded_sentence(program: CapturedProgram, proof: Proof) -> str:
    """Returns what a user should know where the recorded program is not the module on other inputs and weights."""
    state = {k: v.float() if v.is_floating_point() else v for k, v in proof.state.items()}
    inputs = [x.float() if isinstance(x, Tensor) and x.is_floating_point() else x for x in proof.inputs]
    kept = [place for place, slot in enumerate(program.outputs) if slot.kind == USER_OUTPUT]
    try:
        case = OtherCase("", proof, inputs, torch.float32)
        torch.manual_seed(0)
        with torch.no_grad():
            results = fx.Interpreter(program.module).run(*program.arguments(state, inputs), enable_io_processing=False)
        recorded = float_outputs([results[place] for place in kept])
        error = distance(recorded, case.reference, case.scale)
    except REFUSED:
        return ""
    if error <= _SINGLE_TOLERANCE or error <= case.tolerance:
        return ""
    return (
        f"The program was recorded for this case only: with random weights and inputs the module computes something "
        f"else than it (relative difference {error:.2g}), since another branch is taken."
    )


def _taken(build: Callable[[], OtherCase]) -> Iterator[OtherCase]:
    try:
        yield build()
    except REFUSED:
        return


def _numbers(branches: Iterable[Branch], case: Case) -> list[float]:
    return sorted({number for branch in branches if branch.case is case for number in branch.numbers})


def _sizes(inputs: Sequence[object], numbers: Sequence[float]) -> list[tuple[int, int]]:
    """Returns (axis, size) at, below and above each number."""
    around = [int(number) + more for number in numbers if number <= _LARGEST_SIZE for more in (0, 1, -1)]
    sizes = [size for size in dict.fromkeys(around) if size > 0][:_MOST_SIZES]
    rank = min((x.ndim for x in inputs if isinstance(x, Tensor)), default=0)
    return list(itertools.product(range(rank), sizes))


def _resized(inputs: Sequence[object], axis: int, size: int) -> tuple[object, ...] | None:
    """Returns inputs with so many entries along an axis, the last ones repeated; None where they have, or are large."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    if not tensors or any(x.ndim <= axis or not x.numel() for x in tensors):
        return None
    if all(x.shape[axis] == size for x in tensors):
        return None
    if any(x.numel() // x.shape[axis] * size > max(_MOST_NUMBERS, x.numel()) for x in tensors):
        return None
    return tuple(_with_size(x, axis, size) if isinstance(x, Tensor) else x for x in inputs)


def _with_size(tensor: Tensor, axis: int, size: int) -> Tensor:
    place = torch.arange(size).clamp(max=tensor.shape[axis] - 1)
    return tensor.index_select(axis, place)


def _at_values(inputs: Sequence[object], numbers: Sequence[float]) -> dict[str, tuple[object, ...]]:
    """Returns inputs on both sides of each number, of the other sign, and all alike."""
    floats = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
    if not floats:
        return {}
    largest = max(float(x.abs().max()) for x in floats) or 1.0
    goals = [goal for number in numbers if number for goal in (2 * abs(number), abs(number) / 2)]
    given = {"at inputs of the other sign": _each(inputs, torch.neg), "at zero": _each(inputs, torch.zeros_like)}
    for goal in dict.fromkeys([*goals, 100 * largest, largest / 100]):
        given[f"at inputs up to {goal:.3g}"] = _each(inputs, lambda x, factor=goal / largest: x * factor)
        given[f"at inputs of {goal:.3g}"] = _each(inputs, lambda x, height=goal: torch.full_like(x, height))
    return given


def _each(inputs: Sequence[object], change: Callable[[Tensor], Tensor]) -> tuple[object, ...]:
    return tuple(change(x) if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs)
