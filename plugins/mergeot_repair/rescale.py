"""Gives the neurons of a fused model the length of weights that averaging took from them; needs no data."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_ot import AbstractRepair, RepairContext
from mergeot_repair.programs.maps import MapFinder


class RescaleRepair(AbstractRepair):
    """Scales each row of a linear map to the mean length that this row has in the aligned sources.

    The mean of two vectors that do not agree is shorter than they are, so the values of a fused neuron vary less: the
    collapse of variance that arXiv:2211.08403 measures on data. Here it is read off the weights, as if the inputs of a
    map were independent. Recurrent layers are scaled in their input and hidden weights.
    """

    needs_data = False

    def repair(self, context: RepairContext) -> dict[str, Tensor]:
        """Returns the fused state with rescaled rows; biases and BatchNorms stay as they are."""
        state = {name: value.detach().clone() for name, value in context.fused.items()}
        for linear_map in MapFinder(context.program).find():
            for name in linear_map.weights:
                if state[name].ndim >= 2 and name not in context.kept | context.joined:
                    state[name] = _rescaled(context, name, linear_map.output_axis)
        return state


def _rescaled(context: RepairContext, name: str, axis: int) -> Tensor:
    whole = context.fused[name]
    rows = whole.movedim(axis, 0).flatten(1).double()
    goals = [
        share * aligned[name].movedim(axis, 0).flatten(1).double().norm(dim=1)
        for share, aligned in zip(context.model_weights, context.aligned, strict=True)
    ]
    length = rows.norm(dim=1)
    factor = torch.where(length > 0, torch.stack(goals).sum(0) / length, torch.ones_like(length))
    shape = [-1 if place == axis else 1 for place in range(whole.ndim)]
    return (whole.double() * factor.reshape(shape)).to(whole.dtype)
