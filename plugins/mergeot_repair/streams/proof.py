"""Proof that a group of neurons is a stream behind norms: turned as a whole, the network computes the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, fx

from mergekit_ot import CapturedProgram, SlotKind
from mergeot_repair.programs.running import HeldBytes, StagedRun
from mergeot_repair.streams.roles import Roles

# What rounding may change, relative to the largest number, where all is computed in double precision and where a part
# of it is not.
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4}
# A stream is so large that what norms add to its variance is nothing beside it, and then grows so many times.
_SIZE, _GROWTH, _GROWN = 1e3, 2.0, 1e-6
State = Mapping[str, Tensor]


@dataclass(frozen=True)
class Turns:
    """What follows when a stream is turned.

    Attributes:
        axes: Operation → the axis on which its result is turned with the stream.
        raw: Those of these operations whose results grow with the stream: the stream itself, before norms.
        fixes_ones: Whether only turns that keep the mean are possible, as behind LayerNorm.
    """

    axes: Mapping[str, int]
    raw: frozenset[str]
    fixes_ones: bool


def along(value: Tensor, axis: int, matrix: Float[Tensor, "outputs inputs"]) -> Tensor:
    """Returns a tensor with a matrix applied along one of its axes."""
    return (value.movedim(axis, -1) @ matrix.T).movedim(-1, axis)


def members_of(roles: Roles) -> list[tuple[str, int]]:
    """Returns the parameters that are turned with a stream, each with the axis of its neurons."""
    members = [(linear_map.weight, linear_map.input_axis) for linear_map in roles.readers]
    for linear_map in roles.writers:
        members.append((linear_map.weight, linear_map.output_axis))
        if linear_map.bias is not None:
            members.append((linear_map.bias, 0))
    members += roles.images
    if roles.tie is not None:
        members.append((roles.tie.weight, 1))
    return members


class TurnProof:
    """Runs of a program with random weights, as they are and with a group of neurons turned.

    Args:
        program: What the network computes.
        state: Gives the shapes of the parameters, and the buffers.
        inputs: A batch of the size that was traced.
        names: Returns all names of a parameter, ties included.
    """

    def __init__(
        self,
        program: CapturedProgram,
        state: State,
        inputs: Sequence[Tensor],
        names: Callable[[str], Sequence[str]],
    ) -> None:
        self.program, self.state, self.inputs, self.names = program, state, inputs, names

    def turns(self, roles: Roles, size: int) -> Turns | None:
        """Returns what is turned with a stream of so many neurons; None where the network computes something else."""
        for fixes_ones in (False, True):
            for dtype in _TOLERANCES:
                try:
                    first = self._turns(roles, size, fixes_ones, dtype, 0)
                    if first is not None and first == self._turns(roles, size, fixes_ones, dtype, 1):
                        return first
                    break
                except (RuntimeError, TypeError):
                    # An operation that knows one precision only.
                    continue
        return None

    def _turns(self, roles: Roles, size: int, fixes_ones: bool, dtype: torch.dtype, seed: int) -> Turns | None:
        generator = torch.Generator().manual_seed(seed)
        state = self._random(roles, dtype, generator)
        turn = random_turn(size, fixes_ones, generator).to(dtype)
        turned, grown = dict(state), dict(state)
        readers = {linear_map.weight for linear_map in roles.readers}
        for parameter, axis in members_of(roles):
            for name in self.names(parameter):
                if name in state:
                    if parameter not in readers:
                        state[name] = _SIZE * state[name]
                        grown[name] = _GROWTH * state[name]
                    turned[name] = along(state[name], axis, turn)
        runs = [self._run(values, dtype) for values in (state, turned, grown)]
        axes: dict[str, int] = {}
        raw = set[str]()
        for node in self.program.graph.nodes:
            if node.op != "call_function":
                continue
            values = [run.values_of([node.name])[node.name] for run in runs]
            if not isinstance(values[0], Tensor) or not values[0].is_floating_point():
                continue
            tolerance = _TOLERANCES.get(values[0].dtype, _TOLERANCES[torch.float32])
            if self._is_result(node) and not _is_near(values[0], values[1], tolerance):
                return None
            axis = _turned_axis(values[0], values[1], turn, tolerance)
            if axis is not None:
                axes[node.name] = axis
                if _is_near(_GROWTH * values[0], values[2], max(tolerance, _GROWN)):
                    raw.add(node.name)
        return Turns(axes, frozenset(raw), fixes_ones)

    def _is_result(self, node: fx.Node) -> bool:
        return any(user.op == "output" for user in node.users)

    def _run(self, state: State, dtype: torch.dtype) -> StagedRun:
        tensors = {name: _in_type(value, dtype) for name, value in self.program.tensors.items()}
        types = {name: value.dtype for name, value in state.items()}
        program = replace(self.program, tensors=tensors, types=types)
        return StagedRun(program, state, [_in_type(value, dtype) for value in self.inputs], HeldBytes())

    def _random(self, roles: Roles, dtype: torch.dtype, generator: torch.Generator) -> dict[str, Tensor]:
        parameters = {slot.target for slot in self.program.inputs if slot.kind == SlotKind.PARAMETER}
        state: dict[str, Tensor] = {}
        for name, value in self.state.items():
            state[name] = _in_type(value, dtype)
            if name in parameters and value.is_floating_point():
                noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
                spread = 0.5 if value.ndim < 2 else max(1, value[0].numel()) ** -0.5
                middle = float(value.double().mean()) if value.ndim < 2 else 0.0
                state[name] = (middle + spread * noise).to(dtype)
        # A vector that multiplies, or is added behind a norm, turns with the stream where its numbers are the same.
        alike = {**roles.gains, **dict.fromkeys(roles.shifts, 0.0)}
        for parameter, number in alike.items():
            for name in self.names(parameter):
                if name in state:
                    state[name] = torch.full_like(state[name], number)
        tie = [] if roles.tie is None else list(self.names(roles.tie.weight))
        for name in tie[1:]:
            if name in state and tie[0] in state:
                state[name] = state[tie[0]]
        return state


def random_turn(size: int, fixes_ones: bool, generator: torch.Generator) -> Float[Tensor, "size size"]:
    """Returns a random orthogonal matrix, in double precision; on request one that keeps the vector of ones."""
    inner = size - int(fixes_ones)
    turn, _ = torch.linalg.qr(torch.randn(inner, inner, generator=generator, dtype=torch.float64))
    if not fixes_ones:
        return turn
    basis = without_mean(size)
    return basis @ turn @ basis.T + 1 / size


def without_mean(size: int) -> Float[Tensor, "size inner"]:
    """Returns an orthonormal basis of what has mean zero."""
    ones = torch.ones(size, 1, dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.cat([ones, torch.eye(size, size - 1, dtype=torch.float64)], 1))
    return basis[:, 1:]


def _in_type(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.detach().to(dtype) if value.is_floating_point() else value


def _is_near(first: Tensor, second: Tensor, tolerance: float) -> bool:
    size = float(first.abs().max()) if first.numel() else 0.0
    return bool(((first - second).abs() <= tolerance * size).all())


def _turned_axis(first: Tensor, second: Tensor, turn: Tensor, tolerance: float) -> int | None:
    """Returns the axis along which a turn leads from one value to another; None where they are the same."""
    if _is_near(first, second, tolerance):
        return None
    for axis, size in enumerate(first.shape):
        if size == len(turn) and _is_near(along(first, axis, turn.to(first.dtype)), second, tolerance):
            return axis
    return None
