"""Fits what predicts the next token from the states of recurrent layers: to the mean probabilities of the sources.

Mean outputs are the wrong goal there. Most tokens are impossible at most places, and how impossible a source finds
them, by a logit of -10 or of -20, is most of what its outputs vary by and nothing of what it predicts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot import RepairContext, mean_probabilities
from mergeot_repair.programs.maps import LINEAR, RECURRENT, LinearMap
from mergeot_repair.programs.running import HeldBytes, StagedRun
from mergeot_repair.refit.results import Classifier, result_maps
from mergeot_repair.refit.samples import rows_of, weight_of

# So many places are looked at: some tens of seconds, and hundreds for each number that a map reads.
_PLACES = 60_000
# One in so many decides whether the fit is kept.
_HELD_OUT = 5
_STEPS = 80
# Pull towards the weights at hand, by the mean square of what logits change.
_PULL = 1e-5
# Inputs that hardly vary are left alone.
_RIDGE = 1e-7

_Rows = tuple[Float[Tensor, "places inputs"], Float[Tensor, "places tokens"]]


def token_maps(context: RepairContext, maps: Sequence[LinearMap]) -> list[LinearMap]:
    """Returns the maps that predict a token for each token that a network with recurrent layers reads.

    Args:
        context: Of the repair.
        maps: The linear maps of the fused network.
    """
    if not any(linear_map.kind == RECURRENT for linear_map in maps):
        return []
    made = result_maps(context.program, maps, context.joined)
    inputs = next(iter(context.batches))
    shapes = {tuple(each.shape) for each in inputs if not each.is_floating_point()}
    nodes = {node.name: node for node in context.program.graph.nodes}
    return [
        linear_map
        for linear_map in maps
        if linear_map.node in made
        and linear_map.kind == LINEAR
        and tuple(nodes[linear_map.output].meta["val"].shape[:-1]) in shapes
    ]


def fit_tokens(context: RepairContext, linear_map: LinearMap, state: dict[str, Tensor]) -> None:
    """Fits a map that predicts tokens to the mean probabilities of the sources, where that brings it nearer to them.

    Args:
        context: Of the repair.
        linear_map: The map.
        state: Of the fused model; it is changed.
    """
    read, goals = _places(context, linear_map, state)
    is_held_out = torch.arange(len(read)) % _HELD_OUT == 0
    weight, bias = state[linear_map.weight], linear_map.bias
    start = Classifier(rows_of(linear_map, weight), None if bias is None else state[bias])
    found = fitted_to_tokens(start, read[~is_held_out], goals[~is_held_out])
    held = read[is_held_out], goals[is_held_out]
    if not _divergence(found, held) < _divergence(start, held):
        return
    state[linear_map.weight] = weight_of(linear_map, found.weight, weight)
    if bias is not None and found.shift is not None:
        state[bias] = found.shift.to(state[bias].dtype)


def fitted_to_tokens(
    start: Classifier, read: Float[Tensor, "places inputs"], goals: Float[Tensor, "places tokens"]
) -> Classifier:
    """Returns the map whose probabilities have the least Kullback-Leibler divergence from the goals.

    A convex problem, solved by L-BFGS in inputs that are uncorrelated.

    Args:
        start: The weights at hand.
        read: What the map reads.
        goals: Probabilities at each place, which sum to one.

    Example:
        >>> read = torch.tensor([[1.0], [-1.0]]).repeat(20, 1)
        >>> goals = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).repeat(20, 1)
        >>> found = fitted_to_tokens(Classifier(torch.zeros(2, 1), torch.zeros(2)), read, goals)
        >>> torch.allclose(found.logits(read).softmax(1), goals, atol=1e-2)
        True
    """
    has_shift = start.shift is not None
    rows = torch.cat([read, torch.ones_like(read[:, :1])], 1) if has_shift else read
    gram = rows.double().T @ rows.double() / len(rows)
    gram.diagonal().add_(_RIDGE * gram.diagonal().mean())
    factor = torch.linalg.cholesky(gram)
    whitened = torch.linalg.solve_triangular(factor, rows.double().T, upper=False).T.to(rows.dtype)
    made = start.logits(read)
    change = torch.zeros(goals.shape[1], rows.shape[1], dtype=rows.dtype, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [change], max_iter=_STEPS, history_size=20, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def value() -> Tensor:
        optimizer.zero_grad()
        logs = (made + whitened @ change.T).log_softmax(1)
        loss = -(goals * logs).sum() / len(goals) + 0.5 * _PULL * change.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(value)
    moved = torch.linalg.solve_triangular(factor.T, change.detach().double().T, upper=True).T
    weight = (start.weight.double() + moved[:, : read.shape[1]]).to(start.weight.dtype)
    if start.shift is None:
        return Classifier(weight, None)
    return Classifier(weight, (start.shift.double() + moved[:, -1]).to(start.shift.dtype))


def _places(context: RepairContext, linear_map: LinearMap, state: Mapping[str, Tensor]) -> _Rows:
    """Returns what a map reads at places of all batches, and the mean probabilities of the sources there."""
    batches = list(context.batches)
    generator = torch.Generator().manual_seed(0)
    used = [(source, weight) for source, weight in zip(context.sources, context.model_weights, strict=True) if weight]
    found: list[_Rows] = []
    for inputs in batches:
        run = StagedRun(context.program, state, inputs, HeldBytes(0))
        read = run.values_of([linear_map.source])[linear_map.source].flatten(0, -2)
        rows = torch.randperm(len(read), generator=generator)[: -(-_PLACES // len(batches))]
        probabilities = []
        for source, _ in used:
            of_source = StagedRun(source.program, source.state, inputs, HeldBytes(0)).values_of([linear_map.output])
            probabilities.append(of_source[linear_map.output].flatten(0, -2)[rows].softmax(1))
        found.append((read[rows], mean_probabilities(probabilities, [weight for _, weight in used])))
    read, goals = map(torch.cat, zip(*found, strict=True))
    return read, goals


def _divergence(classifier: Classifier, held: _Rows) -> float:
    """Returns the mean cross-entropy, which is the divergence but for what the goals alone decide."""
    read, goals = held
    return -float((goals * classifier.logits(read).log_softmax(1)).sum(dtype=torch.float64))
