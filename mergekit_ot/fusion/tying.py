"""Weights that were made separate for an alignment are tied again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.fusion.normal_states import NormalStates
from mergekit_ot.graph.normal_form.rewrites import Fold


def tied_again(
    state: Mapping[str, Tensor],
    normal: NormalStates,
    originals: Sequence[Mapping[str, Tensor]],
    weights_of: Callable[[str], Sequence[float]],
) -> dict[str, Tensor]:
    """Returns a state whose embeddings are their heads again: gain and bias of the norm between take up the rest.

    The gain is that with which the embedding is nearest to the head (least squares), the bias gives the constant that
    the head adds, as far as the embedding reaches it. Behind a LayerNorm the mean of an embedding's neurons has no say
    in the stream, but has one in the head: it is the mean of those that the sources had.

    Args:
        state: A state in normal form, with separate weights.
        normal: How states were rewritten.
        originals: The sources' states as they were given.
        weights_of: Gives the model weights of a parameter, one per source.
    """
    result = dict(state)
    for alias, name in normal.aliases.items():
        fold = tying_fold(normal, alias)
        if fold is not None:
            axis = fold.readers[0].weight.axis
            means = sum(
                weight * _rows(original[name], axis).mean(1)
                for weight, original in zip(weights_of(name), originals, strict=True)
                if weight > 0
            )
            result |= _tied(state, (name, alias), fold, torch.as_tensor(means))
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


def _tied(
    state: Mapping[str, Tensor], names: tuple[str, str], fold: Fold, means: Float[Tensor, " n"]
) -> dict[str, Tensor]:
    """Returns an embedding, and gain and bias of the norm with which it comes nearest to a head."""
    axis = fold.readers[0].weight.axis
    table, head = (_rows(state[each], axis) for each in names)
    found: dict[str, Tensor] = {}
    centring = torch.eye(table.shape[1], dtype=table.dtype)
    if fold.is_constant:
        centring -= 1 / table.shape[1]
        table = table - table.mean(1, keepdim=True) + means[:, None]
        found[names[0]] = table.movedim(-1, axis) if table.ndim == state[names[0]].ndim else table
        if fold.bias is not None:
            # Its entries are ones there, and the head's sum over the neurons is the constant that it adds.
            found[fold.bias] = _least_squares(table, head.sum(1))
            head = head - head.mean(1, keepdim=True)
    if fold.gain is not None:
        # The squared distance of (table · diag(g) · centring) from the head, as a function of g.
        products = (table.T @ table) * centring
        found[fold.gain] = _least_squares(products, (table * head).sum(0)) - fold.offset
    return {each: value.reshape(state[each].shape).to(state[each].dtype) for each, value in found.items()}


def _least_squares(matrix: Float[Tensor, "n d"], values: Float[Tensor, " n"]) -> Float[Tensor, " d"]:
    return torch.linalg.lstsq(matrix, values[:, None], driver="gelsd").solution[:, 0]


def _rows(weight: Tensor, axis: int) -> Float[Tensor, "n d"]:
    """Returns a weight in double precision with the neurons in columns."""
    return weight.detach().double().cpu().movedim(axis, -1).flatten(0, -2)
