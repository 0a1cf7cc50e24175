"""OTFusion (arXiv:1910.05653): every source is transported to one source, whose support stays as it is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mergekit_ot import (
    AbstractBarycenterSolver,
    BarycenterProblem,
    Permutation,
    Solution,
    barycenter_cost,
    ground_cost,
)
from mergeot_wasserstein.entropic import couple_by


@dataclass(frozen=True)
class FixedSupportSolver(AbstractBarycenterSolver):
    """Couples every source with the first source of the fused group's size.

    Attributes:
        epsilon: Entropic regularisation relative to the mean ground cost; 0 gives exact couplings.
        members: Which layers of a residual stream describe its neurons: ``all``, or the ``first``.
        scaling: ``density``, or ``paper`` to compare and average weights between different widths as they are.
        ground: The ground cost: the ``euclidean`` distance, as in the authors' runs, or its ``square``.
        normalised: Whether neurons are compared by the directions of their weights alone.
    """

    name = "otfusion"
    summary = "couplings of every source with the first one (OTFusion, arXiv:1910.05653)"

    epsilon: Annotated[float, Ge(0)] = 0.0
    members: Literal["all", "first"] = "all"
    scaling: Literal["density", "paper"] = "density"
    ground: Literal["euclidean", "square"] = "euclidean"
    normalised: bool = False

    def find(self, problem: BarycenterProblem) -> Solution:
        """Returns couplings with the fixed support.

        The objective is the transport cost to that support, not to the fused one, by the squared distance, so that it
        can be compared with other solvers'.

        Raises:
            SolverError: No source has the size of the fused group.
        """
        fixed = problem.first_fitting(
            "'otfusion' keeps the support of a source, so one must have that size. Choose another target, or the "
            "solver 'wb'."
        )
        support = problem.measures[fixed].support
        # A source that is alone has nothing to be blended with, and a soft coupling would only blur it.
        epsilon = 0.0 if max(problem.model_weights) == sum(problem.model_weights) else self.epsilon
        couplings = tuple(
            Permutation.identity(problem.size, support.device)
            if place == fixed and measure.is_uniform
            else couple_by(self._cost(support, measure.support), measure, epsilon)
            for place, measure in enumerate(problem.measures)
        )
        return Solution(couplings, objective=partial(barycenter_cost, problem, support=support), reference=fixed)

    def _cost(self, target: Float[Tensor, "m d"], source: Float[Tensor, "n d"]) -> Float[Tensor, "m n"]:
        if self.normalised:
            target, source = functional.normalize(target, dim=1), functional.normalize(source, dim=1)
        cost = ground_cost(target, source)
        return cost if self.ground == "square" else cost.sqrt()
