"""Neurons seen by their weights, by their responses to calibration data, or by both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from mergekit_ot import AbstractDeferredSupport, AbstractNodeMeasure, GroupView, NeuronMeasure, squarable

# Weight of the weights' squared distance beside that of the responses: it decides between equals only.
_TIE_BREAK = 1e-4


class WeightsMeasure(AbstractNodeMeasure):
    """A neuron is the function on the layer before that its weights write down (arXiv:2210.06671)."""

    def measure(self, view: GroupView) -> tuple[NeuronMeasure, ...]:
        """Returns one measure per source, of the aligned tensors in scope."""
        return _with_structure(view, [view.rows(i) for i in range(view.count)])


class ImportanceMeasure(AbstractNodeMeasure):
    """Weights, with a neuron's mass in proportion to the norm of its weights (importance, arXiv:1910.05653).

    The fused neurons have equal masses all the same, so an important neuron is spread over several of them and
    couplings are no permutations, not even of a network with itself.
    """

    def measure(self, view: GroupView) -> tuple[NeuronMeasure, ...]:
        """Returns one measure per source; neurons without weights in scope keep equal masses."""
        measures = []
        for plain in WeightsMeasure().measure(view):
            (rows,) = squarable(plain.support)
            norms = rows.norm(dim=1)
            total = norms.sum()
            mass = norms / total if float(total) > 0 else plain.mass
            measures.append(replace(plain, mass=mass.to(plain.mass)))
        return tuple(measures)


class WeightsAndActivationsMeasure(AbstractNodeMeasure):
    """Both, each scaled to the same mean squared norm."""

    needs_data = True
    weights_norm: ClassVar[float] = 1.0
    is_standardised: ClassVar[bool] = False

    def measure(self, view: GroupView) -> tuple[NeuronMeasure, ...]:
        """Returns one measure per source; a group that no parameter reads is seen by its weights alone."""
        weights = _scaled([view.weights(i) for i in range(view.count)], self.weights_norm)
        responses = view.activations(self.is_standardised)
        if responses is None:
            return _with_structure(view, weights)
        rows = [torch.cat(pair, 1) for pair in zip(_scaled(responses), weights, strict=True)]
        return _with_structure(view, rows, responses[0].shape[1])


class ActivationsMeasure(WeightsAndActivationsMeasure):
    """A neuron is its responses to calibration data, centred, as the next layer reads them.

    Neurons that the data leave silent look alike; a trace of their weights tells them apart.
    """

    weights_norm = _TIE_BREAK


class CorrelationsMeasure(ActivationsMeasure):
    """A neuron is its standardised responses: distances measure correlation (arXiv:2209.04836, arXiv:2211.08403)."""

    is_standardised = True


def _with_structure(
    view: GroupView, rows: Sequence[Tensor | AbstractDeferredSupport], responses: int = 0
) -> tuple[NeuronMeasure, ...]:
    signs = view.signs()
    if signs is not None:
        # Responses stand before the weights, and a negated neuron responds with the opposite sign.
        signs = replace(signs, columns=torch.cat([torch.ones(responses, dtype=torch.bool), signs.columns]))
    return tuple(NeuronMeasure.uniform(support, view.structure(i), signs) for i, support in enumerate(rows))


def _scaled(rows: list[Tensor], norm: float = 1.0) -> list[Tensor]:
    """Returns the rows times one number, so that a neuron's mean squared norm over all sources is `norm`."""
    (every,) = squarable(torch.cat(rows))
    mean = every.square().sum(1).mean()
    factor = (norm / mean.clamp_min(torch.finfo(mean.dtype).tiny)).sqrt()
    return [(part.to(every.dtype) * factor).to(part.dtype) for part in rows]
