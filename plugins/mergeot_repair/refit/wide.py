"""Ridge regression of maps with more inputs than samples: from the samples' inner products with each other.

Both ways give the same weights; one needs a matrix of the size of the inputs, the other one of the size of the samples
(the representer theorem; ridge regression in dual variables, ICML 1998).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mergekit_ot import RepairContext
from mergeot_repair.programs.layouts import stretches
from mergeot_repair.programs.maps import LinearMap
from mergeot_repair.refit.pieces import each
from mergeot_repair.refit.regression import FOLDS, STRENGTHS, Solution, Sums

# Inputs of a map beyond which its Gram matrix takes more than a gigabyte: samples are kept instead. Of those of all
# sources together, beyond which an inverse takes minutes and as much: no neurons are chosen.
MOST_INPUTS, MOST_INPUTS_OF_A_CHOICE = 11_000, 10_000
# Bytes that kept samples may take, and how many are kept at most: a matrix of that size has to be factored.
_KEPT_BYTES, _MOST_KEPT = 600_000_000, 4_000
_BYTES = 4
# So many maps are named in a sentence.
_NAMED = 3


def most_samples(inputs: int) -> int | None:
    """Returns how many samples are fitted to at most by a map whose Gram matrix is too large; None for others."""
    if inputs <= MOST_INPUTS:
        return None
    return max(1, min(_MOST_KEPT, _KEPT_BYTES // (_BYTES * inputs)))


def described(context: RepairContext, maps: Sequence[LinearMap], used: Sequence[int]) -> str | None:
    """Returns a sentence about what is left out because of maps that read too much; None where nothing is.

    Args:
        context: Of the repair.
        maps: The linear maps of the fused model.
        used: Numbers of the sources that have a weight.
    """
    states = [context.sources[number].state for number in used]
    graph = context.sources[0].alignment.target
    groups = {each.weight: {group for group, _ in stretches(graph, each.weight, 1) or ()} for each in maps}
    plain = [each for each in maps if each.is_plain and groups[each.weight] & set(graph.free_groups)]
    read = {each.weight: sum(state[each.weight][0].numel() for state in states) for each in plain}
    wide = [name for name, inputs in read.items() if inputs > MOST_INPUTS_OF_A_CHOICE]
    if not wide or len(used) < 2:
        return None
    named = ", ".join(wide[:_NAMED]) + (f" and {len(wide) - _NAMED} more" if len(wide) > _NAMED else "")
    return (
        f"Refit chooses no neurons among what {named} reads: up to {max(read.values()):,} inputs of all sources, and a "
        f"choice is made of {MOST_INPUTS_OF_A_CHOICE:,} at most. They are the mean of those that the solver matched: "
        "compare solvers, or take a --target with fewer neurons there."
    )


def sums_for(inputs: int, outputs: int, samples: int) -> AnySums:
    """Returns what a regression of so many samples is solved from at least cost.

    Args:
        inputs: Numbers per sample.
        outputs: Targets per sample.
        samples: How many there will be.
    """
    is_wide = most_samples(inputs) is not None
    return KeptSamples() if is_wide or samples < min(inputs, _MOST_KEPT) else Sums(inputs, outputs)


class KeptSamples:
    """A regression that keeps its samples: `mergeot_repair.refit.regression.Sums` for more inputs than samples.

    Example:
        >>> read = torch.tensor([[1.0, 0.0, 1.0], [0.0, 2.0, 0.0]])
        >>> sums = KeptSamples()
        >>> sums.add(read, torch.tensor([[3.0], [4.0]]))
        >>> found = sums.solve(torch.zeros(1, 3), has_shift=False, strength=1e-6)
        >>> [round(float(weight), 3) for weight in found.weight[0]]
        [1.5, 2.0, 1.5]
    """

    def __init__(self) -> None:
        self._inputs: list[Tensor] = []
        self._targets: list[Tensor] = []

    @property
    def batches(self) -> int:
        """How many batches were added."""
        return len(self._inputs)

    def add(
        self,
        inputs: Float[Tensor, "samples inputs"],
        targets: Float[Tensor, "samples outputs"],
        inside: Bool[Tensor, "samples taps"] | None = None,
    ) -> None:
        """Adds a batch, of which a copy is kept; zeros around images (`inside`) are kept as other numbers."""
        self._inputs.append(inputs.clone())
        self._targets.append(targets.double())

    def solve(self, start: Float[Tensor, "outputs inputs"], has_shift: bool, strength: float | None = None) -> Solution:
        """Returns the weights with the least squared error that stay near `start`; the samples are used up.

        Args:
            start: The weights in force, towards which the pull is.
            has_shift: Whether the outputs may be shifted.
            strength: Of the pull, relative to the mean square of an input; what suits the held-out batches where None.
        """
        start, inputs = start.double(), start.shape[1]
        rest = torch.cat(self._targets) - self._made(start)
        lengths = [len(part) for part in self._inputs]
        means = torch.stack([part.sum(0, dtype=torch.float64) for part in self._inputs]).sum(0) / len(rest)
        # Numbers around their mean lose least to rounding.
        for part in self._inputs if has_shift else ():
            part -= means.to(part.dtype)
        products = _products(self._inputs)
        if strength is None and self.batches < FOLDS:
            strength = STRENGTHS[len(STRENGTHS) // 2]
        elif strength is None:
            folds = [torch.full((length,), number % FOLDS) for number, length in enumerate(lengths)]
            strength = _best(products, rest, torch.cat(folds) != 0, inputs, has_shift)
        middle = rest.mean(0) if has_shift else torch.zeros(len(start), dtype=torch.float64)
        factors = _factors(products, rest - middle, inputs, strength)
        change = torch.zeros_like(start)
        for part, of_part in zip(self._inputs, factors.split(lengths), strict=True):
            change += of_part.T @ part.double()
        weight, shift = start + change, middle - change @ means if has_shift else middle
        variance = self._made(weight).var(0, correction=0)
        self._inputs, self._targets = [], []
        return Solution(weight, shift, weight @ means + shift, variance, strength)

    def _made(self, weight: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "samples outputs"]:
        return torch.cat([part.double() @ weight.T for part in self._inputs])


def _products(parts: Sequence[Float[Tensor, "samples inputs"]]) -> Float[Tensor, "samples samples"]:
    """Returns the inner products of samples with each other, in double precision."""
    count = sum(len(part) for part in parts)
    products = torch.empty(count, count, dtype=torch.float64)
    ends = list(itertools.accumulate(len(part) for part in parts))

    def write(number: int) -> None:
        end = ends[number]
        start = end - len(parts[number])
        for other, other_end in zip(parts[: number + 1], ends, strict=False):
            block = parts[number] @ other.T
            products[start:end, other_end - len(other) : other_end] = block
            products[other_end - len(other) : other_end, start:end] = block.T

    each(write, range(len(parts)), count**2 * parts[0].shape[1] / 2)
    return products


def _best(
    products: Float[Tensor, "samples samples"],
    rest: Float[Tensor, "samples outputs"],
    is_fitted: Bool[Tensor, " samples"],
    inputs: int,
    has_shift: bool,
) -> float:
    """Returns the strength of the pull with which a fit to some samples suits the others best."""
    own, others = products[is_fitted][:, is_fitted], products[~is_fitted][:, is_fitted]
    goals, held_out = rest[is_fitted], rest[~is_fitted]
    if has_shift:
        columns, rows, middle = own.mean(0), others.mean(1), own.mean()
        own += middle - columns - columns[:, None]
        others += middle - columns - rows[:, None]
        goals, held_out = goals - goals.mean(0), held_out - goals.mean(0)
    errors = []
    for strength in STRENGTHS:
        missed = held_out - others @ _factors(own, goals, inputs, strength)
        errors.append(float(missed.square().sum()))
    return STRENGTHS[min(range(len(errors)), key=errors.__getitem__)]


def _factors(
    products: Float[Tensor, "samples samples"], goals: Float[Tensor, "samples outputs"], inputs: int, strength: float
) -> Float[Tensor, "samples outputs"]:
    """Returns how much each sample counts in the solution, which is a sum of samples."""
    # Both Gram matrices have the same trace.
    pulled = products.clone()
    pulled.diagonal().add_(strength * float(products.diagonal().sum()) / inputs + 1e-12 * len(products))
    factor, info = torch.linalg.cholesky_ex(pulled)
    return torch.linalg.lstsq(pulled, goals).solution if int(info) else torch.cholesky_solve(goals, factor)


AnySums = Sums | KeptSamples
