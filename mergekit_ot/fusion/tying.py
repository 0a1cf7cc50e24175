"""Weights that were made separate for an alignment are tied again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.fusion.normal_states import NormalStates
from mergekit_ot.graph.normal_form.rewrites import Fold


def tied_again(state: Mapping[str, Tensor], normal: NormalStates) -> dict[str, Tensor]:
    """Returns a state whose embeddings are their heads again: gain and bias of the norm between take up the rest.

    The gain is that with which the embedding is nearest to the head, neuron by neuron (least squares); the bias gives
    the constant that the head adds, as far as the embedding reaches it.

    Args:
        state: A state in normal form, with separate weights.
        normal: How states were rewritten.
    """
    result = dict(state)
    for alias, name in normal.aliases.items():
        fold = tying_fold(normal, alias)
        if fold is not None:
            result |= _norm_between(state, name, alias, fold)
        result[alias] = result[name]
    return result


def tying_fold(normal: NormalStates, alias: str) -> Fold | None:
    """Returns the fold of a norm that a tied weight alone reads; None where there is none.

    Args:
        normal: How states are rewritten, with separate weights.
        alias: Name of the weight.
    """
    for rewrite in normal.form.rewrites:
        if isinstance(rewrite, Fold) and [reader.weight.name for reader in rewrite.readers] == [alias]:
            return rewrite
    return None


def _norm_between(state: Mapping[str, Tensor], name: str, alias: str, fold: Fold) -> dict[str, Tensor]:
    """Returns gain and bias of the norm with which an embedding comes nearest to a head."""
    axis = fold.readers[0].weight.axis
    table, head = (_rows(state[each], axis) for each in (name, alias))
    found = {}
    if fold.is_constant and fold.bias is not None:
        # The bias is all ones there, and the head's sum over the neurons is the constant that it adds.
        constant = head.sum(1)
        head = head - head.mean(1, keepdim=True)
        found[fold.bias] = _least_squares(table, constant)
    if fold.gain is not None:
        moments = table.square().sum(0)
        tiny = torch.finfo(moments.dtype).tiny
        found[fold.gain] = (table * head).sum(0) / moments.clamp_min(tiny) - fold.offset
    return {each: value.reshape(state[each].shape).to(state[each].dtype) for each, value in found.items()}


def _least_squares(table: Float[Tensor, "n d"], constant: Float[Tensor, " n"]) -> Float[Tensor, " d"]:
    return torch.linalg.lstsq(table, constant[:, None], driver="gelsd").solution[:, 0]


def _rows(weight: Tensor, axis: int) -> Float[Tensor, "n d"]:
    """Returns a weight in double precision with the neurons in columns."""
    return weight.detach().double().cpu().movedim(axis, -1).flatten(0, -2)
