"""How similar the layers of two networks are on data."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot import FusionResult, ResponseGrams
from mergeot_diagnose.samples import Samples


def linear_cka(first: Float[Tensor, "n d"], second: Float[Tensor, "m d"]) -> float:
    """Returns the linear centred kernel alignment of two sets of neurons (arXiv:1905.00414), from 0 to 1.

    It does not change where neurons are reordered, rotated or scaled together.

    Args:
        first: One row of centred responses per neuron.
        second: The same of the other network, to the same inputs.

    Example:
        >>> rows = torch.tensor([[1.0, -1.0, 0.0], [0.0, 1.0, -1.0]])
        >>> round(linear_cka(rows, 3 * rows.flip(0)), 6)
        1.0
    """
    own = float((first @ first.T).norm() * (second @ second.T).norm())
    return float((first @ second.T).square().sum()) / own if own else 0.0


def layer_similarities(result: FusionResult, samples: Samples) -> dict[str, float]:
    """Returns the linear CKA of each neuron group of the first two sources of a fusion; groups inside heads have none.

    Args:
        result: A fusion of sources in their own form, traced with a batch of the samples.
        samples: What the networks respond to.
    """
    states = [source.state for source in result.models.sources[:2]]
    groups = [key for key, group in result.alignment.target.free_groups.items() if not group.context]
    grams = ResponseGrams(result.alignment.graphs[:2], states, groups, len(samples.inputs))
    with torch.no_grad():
        for inputs in samples.inputs:
            grams.add(inputs)
    similarities = {}
    for group in groups:
        rows = grams.rows(group)
        if rows is not None:
            similarities[group] = linear_cka(*rows)
    return similarities
