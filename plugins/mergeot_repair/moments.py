"""REPAIR: gives each neuron of a fused model the mean and deviation that the aligned sources have in the mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot import AbstractRepair, RepairContext
from mergeot_repair.control import check_control
from mergeot_repair.programs.maps import RECURRENT, LinearMap, MapFinder
from mergeot_repair.programs.running import HeldBytes, StagedRun

# A neuron whose deviation is below this share of its layer's says nothing: it is not blown up.
_SILENT = 1e-4


class MomentsRepair(AbstractRepair):
    """Rescales and shifts what each hidden linear map makes (arXiv:2211.08403).

    The target is the mean, over the sources, of a neuron's mean and of its standard deviation on the calibration data.
    A BatchNorm behind a map takes the correction up, else the map's own weights and bias do; without a bias only the
    deviation can be set right. Recurrent layers and what is a result of the model stay as they are.
    """

    needs_data = True

    def repair(self, context: RepairContext) -> dict[str, Tensor]:
        """Returns the fused state with corrected maps.

        Raises:
            DataError: The procedure changes an untouched source, which is its control.
        """
        check_control(context, "repair", _corrected)
        return _corrected(context)


def _corrected(context: RepairContext) -> dict[str, Tensor]:
    state = {name: value.detach().clone() for name, value in context.fused.items()}
    batches, room = list(context.batches), HeldBytes()
    runs = [StagedRun(context.program, state, inputs, room) for inputs in batches]
    sources = [[StagedRun(one.program, one.state, inputs, room) for inputs in batches] for one in context.sources]
    maps = [one for one in MapFinder(context.program).find() if one.kind != RECURRENT]
    maps = [one for one in maps if not any(user.op == "output" for user in runs[0].nodes[one.output].users)]
    for number, one in enumerate(maps, start=1):
        mean, deviation = _moments(runs, one)
        goals = []
        for source, of_source in zip(context.sources, sources, strict=True):
            goals.append(
                [source.in_fused_order(part, 0, one.weight, one.output_axis) for part in _moments(of_source, one)]
            )
        goal_mean, goal_deviation = (
            torch.stack([share * goal[place] for share, goal in zip(context.model_weights, goals, strict=True)]).sum(0)
            for place in (0, 1)
        )
        is_silent = deviation <= _SILENT * deviation.max()
        factor = torch.where(is_silent, torch.ones_like(deviation), goal_deviation / deviation)
        corrected = _write(state, one, factor, mean, goal_mean)
        for run in runs:
            run.change(one.output, corrected)
        if context.progress is not None:
            context.progress(number, len(maps), f"repair {one.weight}")
    return state


def _moments(runs: Sequence[StagedRun], one: LinearMap) -> tuple[Float[Tensor, " neuron"], Float[Tensor, " neuron"]]:
    """Returns the mean and the standard deviation of what each neuron of a map has on all batches."""
    total = square = torch.zeros(())
    count = 0
    for run in runs:
        values = run.values_of([one.output])[one.output].double()
        rows = values.movedim(one.values_axis, 0).flatten(1)
        total, square, count = total + rows.sum(1), square + rows.square().sum(1), count + rows.shape[1]
        run.settle()
    mean = total / count
    return mean, (square / count - mean.square()).clamp_min(0).sqrt()


def _write(
    state: dict[str, Tensor], one: LinearMap, factor: Tensor, mean: Tensor, goal: Tensor
) -> Callable[[Tensor], Tensor]:
    """Changes the parameters, and returns what that does to values made with the old ones."""
    found: dict[str, Tensor] = {}
    scale, shift = (None, one.bias) if one.norm is None else one.norm[:2]
    if scale is not None:
        found[scale] = state[scale] * factor
    else:
        found[one.weight] = state[one.weight] * _along(factor, one.output_axis, state[one.weight].ndim)
    if one.norm is not None and scale is None:
        # The mean that a BatchNorm takes away grows with the weights before it.
        found[one.norm[2]] = state[one.norm[2]] * factor
        if one.bias is not None:
            found[one.bias] = state[one.bias] * factor
    if shift is not None:
        found[shift] = factor * (state[shift] - mean) + goal
    for name, value in found.items():
        state[name] = value.to(state[name].dtype)
    before, after = (mean, goal) if shift is not None else (torch.zeros_like(mean),) * 2
    axis = one.values_axis

    def corrected(values: Tensor) -> Tensor:
        parts = [_along(part, axis, values.ndim).to(values.dtype) for part in (factor, before, after)]
        return parts[0] * (values - parts[1]) + parts[2]

    return corrected


def _along(values: Tensor, axis: int, rank: int) -> Tensor:
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)
