"""What every solver is watched for: small gains count, and rows that change places are a change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from mergekit_ot import (
    AbstractBarycenterSolver,
    BarycenterProblem,
    Coupling,
    NeuronMeasure,
    Permutation,
    SolverError,
)
from mergekit_ot.testing import random_problem


@dataclass(frozen=True, eq=False)
class Given(AbstractBarycenterSolver):
    """Finds what it is given."""

    found: tuple[Coupling, ...] = ()
    name = "given"

    def find(self, problem: BarycenterProblem) -> Sequence[Coupling]:
        return self.found


@dataclass(frozen=True, eq=False)
class Sorting(AbstractBarycenterSolver):
    """Writes the rows of a measure back in the opposite order: their sum stays."""

    name = "sorting"

    def find(self, problem: BarycenterProblem) -> Sequence[Coupling]:
        support = problem.measures[1].support
        support.copy_(support.flip(0))
        return (Permutation.identity(problem.size),) * len(problem.measures)


def test_a_gain_that_is_small_beside_the_weights_replaces_what_is_in_force() -> None:
    # Two neurons far from zero and near each other: the gain is 2.5e-5 of the weights' squares.
    measure = NeuronMeasure.uniform(torch.tensor([[10.0], [10.1]]))
    same, swapped = Permutation.identity(2), Permutation(torch.tensor([1, 0]))
    problem = BarycenterProblem((measure, measure), (0.5, 0.5), size=2, initial=(same, swapped))
    solved = Given((same, same)).solve(problem)
    assert solved.couplings[1].is_identity
    assert solved.cost == 0


def test_a_solver_that_exchanges_the_rows_it_is_given_is_told() -> None:
    with pytest.raises(SolverError, match=r"the measure of source \d was changed in place"):
        Sorting().solve(random_problem((4, 4)))
