"""REPAIR: gives each neuron of a fused model the mean and deviation that the aligned sources have in the mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot import AbstractRepair, RepairContext
from mergeot_repair.control import SHIFTED, check_control, check_statistics
from mergeot_repair.programs.maps import RECURRENT, LinearMap, free_maps
from mergeot_repair.programs.running import HeldBytes, StagedRun, staged_runs

# A neuron whose deviation is below this share of its layer's says nothing: it is not blown up.
_SILENT = 1e-4
_Moments = tuple[Float[Tensor, " neuron"], Float[Tensor, " neuron"]]


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
        check_statistics(context, "repair", least_shift=SHIFTED)
        check_control(context, "repair", _corrected)
        return _corrected(context)


def _corrected(context: RepairContext) -> dict[str, Tensor]:
    state = {name: value.detach().clone() for name, value in context.fused.items()}
    batches, room = list(context.batches), HeldBytes()
    runs = staged_runs(context.program, state, batches, room)
    source_runs = [staged_runs(source.program, source.state, batches, room) for source in context.sources]
    maps = [linear_map for linear_map in free_maps(context) if _is_hidden(linear_map, runs[0])]
    for number, linear_map in enumerate(maps, start=1):
        mean, deviation = _moments(runs, linear_map)
        goal_mean, goal_deviation = _goals(context, source_runs, linear_map)
        is_silent = deviation <= _SILENT * deviation.max()
        factor = torch.where(is_silent, torch.ones_like(deviation), goal_deviation / deviation)
        corrected = _write(state, linear_map, factor, mean, goal_mean)
        for run in runs:
            run.change(linear_map.output, corrected)
        if context.progress is not None:
            context.progress(number, len(maps), f"repair {linear_map.weight}")
    return state


def _is_hidden(linear_map: LinearMap, run: StagedRun) -> bool:
    """Whether a map is not recurrent and what it makes is no result of the model."""
    readers = run.nodes[linear_map.output].users
    return linear_map.kind != RECURRENT and not any(reader.op == "output" for reader in readers)


def _goals(context: RepairContext, source_runs: Sequence[Sequence[StagedRun]], linear_map: LinearMap) -> _Moments:
    """Returns the weighted means, over the sources, of their neurons' means and standard deviations."""
    means, deviations = [], []
    for source, share, runs in zip(context.sources, context.model_weights, source_runs, strict=True):
        mean, deviation = (
            source.in_fused_order(moment, 0, linear_map.weight, linear_map.output_axis)
            for moment in _moments(runs, linear_map)
        )
        means.append(share * mean)
        deviations.append(share * deviation)
    return torch.stack(means).sum(0), torch.stack(deviations).sum(0)


def _moments(runs: Sequence[StagedRun], linear_map: LinearMap) -> _Moments:
    """Returns the mean and the standard deviation of what each neuron of a map has on all batches."""
    total = square = torch.zeros(())
    count = 0
    for run in runs:
        values = run.values_of([linear_map.output])[linear_map.output].double()
        rows = values.movedim(linear_map.values_axis, 0).flatten(1)
        total, square, count = total + rows.sum(1), square + rows.square().sum(1), count + rows.shape[1]
        run.settle()
    mean = total / count
    return mean, (square / count - mean.square()).clamp_min(0).sqrt()


def _write(
    state: dict[str, Tensor], linear_map: LinearMap, factor: Tensor, mean: Tensor, goal: Tensor
) -> Callable[[Tensor], Tensor]:
    """Changes the parameters, and returns what that does to values made with the old ones."""
    written: dict[str, Tensor] = {}
    norm, weight = linear_map.norm, state[linear_map.weight]
    scale, shift = (None, linear_map.bias) if norm is None else (norm.scale, norm.shift)
    if scale is not None:
        written[scale] = state[scale] * factor
    else:
        written[linear_map.weight] = weight * _along(factor, linear_map.output_axis, weight.ndim)
    if norm is not None and scale is None:
        # The mean that a BatchNorm takes away grows with the weights before it.
        written[norm.mean] = state[norm.mean] * factor
        if linear_map.bias is not None:
            written[linear_map.bias] = state[linear_map.bias] * factor
    if shift is not None:
        written[shift] = factor * (state[shift] - mean) + goal
    for name, value in written.items():
        state[name] = value.to(state[name].dtype)
    before, after = (mean, goal) if shift is not None else (torch.zeros_like(mean),) * 2
    axis = linear_map.values_axis

    def corrected(values: Tensor) -> Tensor:
        factors = [_along(part, axis, values.ndim).to(values.dtype) for part in (factor, before, after)]
        return factors[0] * (values - factors[1]) + factors[2]

    return corrected


def _along(values: Tensor, axis: int, rank: int) -> Tensor:
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)
