"""Neurons seen by their weights, by their responses to calibration data, or by both."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from mergekit_ot import AbstractNodeMeasure, GroupView, NeuronMeasure


class WeightsMeasure(AbstractNodeMeasure):
    """A neuron is the function on the layer before that its weights write down (arXiv:2210.06671)."""

    def measure(self, view: GroupView) -> tuple[NeuronMeasure, ...]:
        """Returns one measure per source, of the aligned tensors in scope."""
        return tuple(NeuronMeasure.uniform(view.weights(i), view.structure(i)) for i in range(view.count))


class ActivationsMeasure(AbstractNodeMeasure):
    """A neuron is its responses to calibration data, as the next layer reads them."""

    needs_data = True
    is_standardised: ClassVar[bool] = False

    def measure(self, view: GroupView) -> tuple[NeuronMeasure, ...]:
        """Returns one measure per source; a group that no parameter reads falls back to its weights."""
        responses = view.activations(self.is_standardised)
        if responses is None:
            return WeightsMeasure().measure(view)
        return tuple(NeuronMeasure.uniform(rows, view.structure(i)) for i, rows in enumerate(responses))


class CorrelationsMeasure(ActivationsMeasure):
    """A neuron is its standardised responses: distances measure correlation (arXiv:2209.04836, arXiv:2211.08403)."""

    is_standardised = True


class WeightsAndActivationsMeasure(AbstractNodeMeasure):
    """Both, each scaled to the same mean squared norm."""

    needs_data = True

    def measure(self, view: GroupView) -> tuple[NeuronMeasure, ...]:
        """Returns one measure per source, with weights and responses side by side."""
        weights = _scaled([view.weights(i) for i in range(view.count)])
        responses = view.activations()
        rows = (
            [*weights]
            if responses is None
            else [torch.cat(pair, 1) for pair in zip(weights, _scaled(responses), strict=True)]
        )
        return tuple(NeuronMeasure.uniform(support, view.structure(i)) for i, support in enumerate(rows))


def _scaled(rows: list[Tensor]) -> list[Tensor]:
    """Returns the rows divided by one number, so that a neuron's mean squared norm over all sources is one."""
    stacked = torch.cat(rows)
    norm = stacked.square().sum(1).mean().clamp_min(1e-30).sqrt()
    return [part / norm for part in rows]
