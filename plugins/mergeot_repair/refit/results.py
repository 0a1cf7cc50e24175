"""The maps that make a network's results, and their fit to the probabilities that the sources give each class.

Sources that saw other classes are sure of different things, and a mean of logits is what no one of them says: the mean
of their probabilities is the better ensemble. Which one is wanted is `mergekit_ot.Aim`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import minimize
from torch import Tensor, fx

from mergekit_ot import CapturedProgram, mean_probabilities, named_arguments, operation_name
from mergeot_repair.programs.maps import CONVOLUTION, LINEAR, LinearMap
from mergeot_repair.refit.regression import Sums

_COPIES = ("aten.clone", "aten.contiguous", "aten.dropout", "aten.alias", "aten.detach")
_RESHAPES = ("aten.view", "aten._unsafe_view", "aten.reshape", "aten.flatten", "aten.unsqueeze", "aten.squeeze")
_SOFTMAXES = ("aten.softmax", "aten._softmax", "aten.log_softmax", "aten._log_softmax")
# Of a class that no source believes in, the logarithm would count without end.
_LEAST_PROBABILITY = 1e-4
# Strengths of the pull towards the weights at hand, relative to the mean square of an input.
_STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
# One in so many samples is held out for a choice; each part in turn where there are few numbers.
_FOLDS = 5
_FEW_NUMBERS = 4_000_000
# A regression is given its samples in so many parts, of which it holds out some in turn.
_PARTS = 8
# So many numbers of what a map reads are looked at, at most: 0.5 GB in double precision.
_MOST_NUMBERS = 60_000_000
_MOST_STEPS = 200
# What the results may be fitted to.
AUTO, OUTPUTS, LOG_PROBABILITIES, PROBABILITIES = "auto", "outputs", "log-probabilities", "probabilities"
_SAW_DIFFERENT_THINGS = (
    "The sources are sure of different classes, as after training on different ones: the results are fitted to the "
    "{}, which gives the answers of the sources' mean probabilities most often (--repair-option target=NAME chooses)."
)
_TARGETS = {
    "outputs": "mean of their outputs",
    "log-probabilities": "logarithm of the mean of their probabilities",
    "probabilities": "mean of their probabilities",
}


def result_maps(
    program: CapturedProgram, maps: Sequence[LinearMap], joined: frozenset[str] = frozenset()
) -> frozenset[str]:
    """Returns the operations of those maps that make classes: nothing but a softmax and copies stands behind them.

    Args:
        program: The captured program; only one that hands out a single tensor has such a map.
        maps: Its linear maps.
        joined: Weights that hold the heads of several sources, whose classes are not the same.
    """
    nodes = {node.name: node for node in program.graph.nodes}
    outputs = [node for node in program.graph.nodes if node.op == "output"]
    if len(outputs) != 1 or len(outputs[0].all_input_nodes) != 1:
        return frozenset()
    plain = [each for each in maps if each.kind in (LINEAR, CONVOLUTION) and each.groups == 1 and each.norm is None]
    of_one = [each for each in plain if each.weight not in joined]
    return frozenset(each.node for each in of_one if _makes_classes(nodes[each.output], each))


def _makes_classes(node: fx.Node, linear_map: LinearMap) -> bool:
    """Whether what a map makes reaches the program's output, classes on the axis on which the map makes them."""
    axis = linear_map.values_axis
    while len(node.users) == 1:
        (user,) = node.users
        if user.op == "output":
            return True
        if not _keeps_classes(user, node.meta["val"].shape, axis):
            return False
        node = user
    return False


def _keeps_classes(user: fx.Node, before: torch.Size, axis: int) -> bool:
    """Whether an operation leaves classes on their axis."""
    operation = operation_name(user)
    if operation in _SOFTMAXES:
        return named_arguments(user)["dim"] % len(before) == axis % len(before)
    is_reshaped = operation in _RESHAPES and axis == -1
    return operation in _COPIES or (is_reshaped and before[-1] == user.meta["val"].shape[-1])


def saying_target(target: str) -> str:
    """Returns a sentence about the target that was taken, where another than the outputs was looked for."""
    return _SAW_DIFFERENT_THINGS.format(_TARGETS[target])


def log_probabilities(
    probabilities: Float[Tensor, "samples classes"],
) -> Float[Tensor, "samples classes"]:
    """Returns logits that have these probabilities, with a mean of zero for each sample.

    Example:
        >>> log_probabilities(torch.tensor([[0.5, 0.5]])).tolist()
        [[0.0, 0.0]]
    """
    logits = probabilities.clamp_min(_LEAST_PROBABILITY).log()
    return logits - logits.mean(1, keepdim=True)


@dataclass(frozen=True)
class Classifier:
    """A linear map whose results are logits.

    Attributes:
        weight: One row per class.
        shift: One number per class; None where the map has none.
    """

    weight: Float[Tensor, "classes inputs"]
    shift: Float[Tensor, " classes"] | None

    def logits(self, inputs: Float[Tensor, "samples inputs"]) -> Float[Tensor, "samples classes"]:
        """Returns what the map makes of inputs."""
        made = inputs @ self.weight.to(inputs.dtype).T
        return made if self.shift is None else made + self.shift.to(inputs.dtype)


class ResultRows:
    """What a map that makes classes reads, and what the sources make there, sample by sample.

    Example:
        Two sources that are sure of one class each; the map reads which of them to follow:

        >>> rows = ResultRows()
        >>> inputs = torch.eye(2).repeat(50, 1)
        >>> of_sources = [inputs * 4, inputs * 2]
        >>> rows.add(inputs, (of_sources[0] + of_sources[1]) / 2, of_sources, (0.5, 0.5))
        >>> found = rows.fitted("probabilities", Classifier(torch.zeros(2, 2), torch.zeros(2)))
        >>> bool((found.weight.argmax(0) == torch.tensor([0, 1])).all())
        True
    """

    def __init__(self) -> None:
        self._read: list[Tensor] = []
        self._outputs: list[Tensor] = []
        self._probabilities: list[Tensor] = []

    def add(
        self,
        read: Float[Tensor, "samples inputs"],
        outputs: Float[Tensor, "samples classes"],
        of_sources: Sequence[Float[Tensor, "samples classes"]],
        model_weights: Sequence[float],
    ) -> None:
        """Adds a batch: what the map reads, the mean of the sources' outputs, those of each, and their weights."""
        self._read.append(read)
        self._outputs.append(outputs)
        each = [logits.double().softmax(1) for logits in of_sources]
        self._probabilities.append(mean_probabilities(each, model_weights))

    def fitted(self, target: str, start: Classifier) -> Classifier:
        """Returns the map that is fitted to a target, from the weights at hand."""
        read, outputs, probabilities = self._drawn()
        return _fitted_to(target, read, outputs, probabilities, start)

    def best_target(self, start: Classifier) -> str:
        """Returns the target whose fit has the answers of the mean probabilities most often, of samples held out."""
        read, outputs, probabilities = self._drawn()
        targets = (PROBABILITIES, LOG_PROBABILITIES, OUTPUTS)
        equal = dict.fromkeys(targets, 0)
        numbers = torch.arange(len(read)) % _FOLDS
        for fold in range(_FOLDS if read.numel() <= _FEW_NUMBERS else 1):
            kept, out = numbers != fold, numbers == fold
            answers = probabilities[out].argmax(1)
            for target in targets:
                found = _fitted_to(target, read[kept], outputs[kept], probabilities[kept], start)
                equal[target] += int((found.logits(read[out]).argmax(1) == answers).sum())
        return max(targets, key=equal.__getitem__)

    def _drawn(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the samples in a random order, so that each part of them is like the others."""
        read, outputs, probabilities = map(torch.cat, (self._read, self._outputs, self._probabilities))
        most = max(1, _MOST_NUMBERS // max(read.shape[1], 1))
        drawn = torch.randperm(len(read), generator=torch.Generator().manual_seed(0))[:most]
        return read[drawn], outputs[drawn], probabilities[drawn]


def _fitted_to(
    target: str,
    read: Float[Tensor, "samples inputs"],
    outputs: Float[Tensor, "samples classes"],
    probabilities: Float[Tensor, "samples classes"],
    start: Classifier,
) -> Classifier:
    if target == OUTPUTS:
        return _regressed(read, outputs, start)
    found = _regressed(read, log_probabilities(probabilities), start)
    return found if target == LOG_PROBABILITIES else fitted_classifier(found, read, probabilities)


def _regressed(
    read: Float[Tensor, "samples inputs"], goals: Float[Tensor, "samples classes"], start: Classifier
) -> Classifier:
    """Returns the map with the least squared error, pulled towards the weights at hand."""
    sums = Sums(read.shape[1], goals.shape[1])
    for part, goal in zip(read.chunk(_PARTS), goals.to(read.dtype).chunk(_PARTS), strict=True):
        sums.add(part, goal)
    solution = sums.solve(start.weight, start.shift is not None)
    dtype = start.weight.dtype
    return Classifier(solution.weight.to(dtype), None if start.shift is None else solution.shift.to(dtype))


def fitted_classifier(
    start: Classifier,
    inputs: Float[Tensor, "samples inputs"],
    goals: Float[Tensor, "samples classes"],
) -> Classifier:
    """Returns the map whose probabilities have the least Kullback-Leibler divergence from the goals.

    It is multinomial logistic regression on soft targets, with a ridge around the weights at hand whose strength suits
    samples best that were held out. The problem is convex; it is solved by L-BFGS, in inputs that are uncorrelated.

    Args:
        start: The weights at hand.
        inputs: What the map reads.
        goals: Probabilities of each sample, which sum to one.

    Example:
        >>> inputs = torch.tensor([[1.0], [-1.0]]).repeat(20, 1)
        >>> goals = torch.tensor([[0.75, 0.25], [0.25, 0.75]]).repeat(20, 1)
        >>> start = Classifier(torch.zeros(2, 1), torch.zeros(2))
        >>> found = fitted_classifier(start, inputs, goals)
        >>> torch.allclose((inputs @ found.weight.T + found.shift).softmax(1), goals, atol=1e-2)
        True
    """
    rows = _with_ones(inputs.double(), start)
    goals = goals.double()
    weights = _joined(start)
    is_held_out = torch.arange(len(rows)) % _FOLDS == _FOLDS - 1
    has_shift = start.shift is not None
    problem = _Problem(rows[~is_held_out], goals[~is_held_out], weights, has_shift)
    errors: list[tuple[float, float]] = []
    change = torch.zeros_like(weights)
    # From the strongest pull to the weakest, each from where the one before has ended.
    for strength in reversed(_STRENGTHS):
        change = problem.solve(strength, change)
        errors.append((_divergence(rows[is_held_out], goals[is_held_out], weights + change), strength))
    return _split(weights + _Problem(rows, goals, weights, has_shift).solve(min(errors)[1], change), start)


class _Problem:
    """The fit of a classifier, in coordinates in which what it reads is uncorrelated."""

    def __init__(
        self,
        rows: Float[Tensor, "samples inputs"],
        goals: Float[Tensor, "samples classes"],
        weights: Float[Tensor, "classes inputs"],
        has_shift: bool,
    ) -> None:
        self.goals, self.weights, self.rows = goals, weights, rows
        self.gram = rows.T @ rows / len(rows)
        # The shift is not pulled: it has a scale of its own.
        self.is_pulled = torch.ones(rows.shape[1], dtype=rows.dtype)
        self.is_pulled[-1] = 0.0 if has_shift else 1.0
        self.size = float((self.gram.diagonal() * self.is_pulled).sum() / self.is_pulled.sum().clamp_min(1))

    def solve(self, strength: float, start: Float[Tensor, "classes inputs"]) -> Float[Tensor, "classes inputs"]:
        """Returns the best change of the weights for a strength of the pull."""
        pull = strength * self.size
        pulled = self.gram.clone()
        pulled.diagonal().add_(pull * self.is_pulled + 1e-12 * self.size)
        factor = torch.linalg.cholesky(pulled)
        made = self.rows @ self.weights.T

        def value_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
            whitened = torch.from_numpy(flat).reshape(self.weights.shape)
            change = torch.linalg.solve_triangular(factor.T, whitened.T, upper=True).T
            logs = (made + self.rows @ change.T).log_softmax(1)
            kept = change * self.is_pulled
            value = -float((self.goals * logs).sum()) / len(logs) + 0.5 * pull * float(kept.square().sum())
            missed = (logs.exp() - self.goals) / len(logs)
            gradient = missed.T @ self.rows + pull * kept
            turned = torch.linalg.solve_triangular(factor, gradient.T, upper=False).T
            return value, turned.reshape(-1).numpy()

        begin = (start @ factor).reshape(-1).numpy()
        options = {"maxiter": _MOST_STEPS, "maxcor": 20, "ftol": 1e-9, "gtol": 1e-6}
        found = minimize(value_and_gradient, begin, jac=True, method="L-BFGS-B", options=options)
        whitened = torch.from_numpy(np.ascontiguousarray(found.x)).reshape(self.weights.shape)
        return torch.linalg.solve_triangular(factor.T, whitened.T, upper=True).T


def _divergence(
    rows: Float[Tensor, "samples inputs"],
    goals: Float[Tensor, "samples classes"],
    weights: Float[Tensor, "classes inputs"],
) -> float:
    """Returns the mean cross-entropy, which is the divergence but for what the goals alone decide."""
    return -float((goals * (rows @ weights.T).log_softmax(1)).sum()) / max(len(rows), 1)


def _with_ones(inputs: Float[Tensor, "samples inputs"], start: Classifier) -> Float[Tensor, "samples inputs"]:
    return inputs if start.shift is None else torch.cat([inputs, torch.ones_like(inputs[:, :1])], 1)


def _joined(start: Classifier) -> Float[Tensor, "classes inputs"]:
    weight = start.weight.double()
    return weight if start.shift is None else torch.cat([weight, start.shift.double()[:, None]], 1)


def _split(weights: Float[Tensor, "classes inputs"], start: Classifier) -> Classifier:
    weights = weights.to(start.weight.dtype)
    return Classifier(weights, None) if start.shift is None else Classifier(weights[:, :-1], weights[:, -1])
