"""Every registered solver on degenerate measures: any scale, dead, equal, duplicated and single neurons, any type."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_ot import (
    AbstractBarycenterSolver,
    Barycenter,
    BarycenterProblem,
    Coupling,
    NeuronMeasure,
    Permutation,
    RecipeError,
    Scope,
    Solution,
    Status,
    default_manager,
    uniform_mass,
)
from mergekit_ot.testing import permuted, random_problem
from mergekit_ot.transport.ground_cost import couple, ground_cost

SOLVERS = tuple(sorted(default_manager().solvers))
# A solver that leaves neurons where they are finds no order.
ALIGNING = tuple(name for name in SOLVERS if name != "average")
KINDS = ("plain", "dead", "all dead", "equal", "duplicated", "tiny beside huge", "wide columns")
SCALES = (1.0, 1e20, 1e-20, 1e30, 1e-30)
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SEEDS = st.integers(0, 10_000)


def solver_of(name: str) -> AbstractBarycenterSolver:
    return default_manager().get("solver", name)()


def support_of(kind: str, size: int, seed: int) -> torch.Tensor:
    """Rows of neurons, in double precision."""
    rows = torch.randn(size, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "dead":
        rows[: (size + 1) // 2] = 0
    elif kind == "all dead":
        rows.zero_()
    elif kind == "equal":
        rows[:] = rows[0].clone()
    elif kind == "duplicated":
        rows[: size // 2] = rows[size - size // 2 :]
    elif kind == "tiny beside huge":
        rows = rows / rows.norm(dim=1, keepdim=True) * 10.0 ** (5 * (torch.arange(size) % 3 - 1))[:, None]
    elif kind == "wide columns":
        rows = rows * 10.0 ** torch.tensor([0, 20, -20, 10, -10])
    return rows


def measure_of(kind: str, size: int, scale: float, dtype: torch.dtype, seed: int, slices: int = 0) -> NeuronMeasure:
    """A measure that is finite in its type."""
    numbers = torch.finfo(dtype)
    if dtype is torch.float16:
        scale = 1.0 if kind == "wide columns" else max(min(scale, 1e3), 1e-3)
    limit = numbers.max / 4
    support = (support_of(kind, size, seed) * scale).clamp(-limit, limit).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    structure = torch.randn(slices, size, size, generator=generator, dtype=torch.float64) * scale
    return NeuronMeasure.uniform(support, structure.clamp(-limit, limit).to(dtype) if slices else None)


def assert_right(problem: BarycenterProblem, found: Barycenter, has_free_masses: bool = False) -> None:
    """Finite numbers, marginals that are the masses, and types that stay; where masses are free, none is lost."""
    assert found.status is not Status.NONFINITE
    assert math.isfinite(found.cost)
    assert bool(torch.isfinite(found.measure.support).all())
    assert found.measure.support.dtype == problem.measures[0].support.dtype
    for coupling, measure in zip(found.couplings, problem.measures, strict=True):
        like = torch.empty(0, dtype=torch.float64)
        mass = uniform_mass(problem.size, like)
        if not has_free_masses:
            torch.testing.assert_close(coupling.target_marginal(like), mass, atol=1e-5, rtol=0)
        torch.testing.assert_close(coupling.source_marginal(like), measure.mass.double(), atol=1e-3, rtol=0)


def copies(problem: BarycenterProblem, size: int, seed: int) -> BarycenterProblem:
    """The first measure beside itself in another order."""
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    first = problem.measures[0]
    return replace(problem, measures=(first, permuted(first, order)))


def same_rows(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two supports hold the same rows, one after the other in any order; each row by its own scale."""
    one, other = one.double(), other.double()
    if bool(torch.equal(one, other)):
        return True
    size = torch.maximum(one.abs().amax(1), other.abs().amax(1)).clamp_min(1e-300)
    return bool(((one - other).abs().amax(1) <= 1e-2 * size).all())


def check_copy(name: str, kind: str, scale: float, dtype: torch.dtype, size: int, seed: int, slices: int) -> None:
    solver = solver_of(name)
    measure = measure_of(kind, size, scale, dtype, seed, slices if solver.wants_structure else 0)
    problem = copies(BarycenterProblem((measure, measure), (0.5, 0.5), size, seed=seed), size, seed + 2)
    found = solver.solve(problem)
    assert_right(problem, found, solver.has_free_masses)
    if name not in ALIGNING:
        return
    if solver.has_free_masses:
        # Of equal neurons a fused one may take those of one copy only; it is one of them all the same.
        fused, rows = found.measure.support, measure.support
        assert all(any(same_rows(one[None], other[None]) for other in rows) for one in fused), (fused, rows)
        return
    # Moved by their couplings, both are the same neuron by neuron, and so is what they are fused into.
    first, second = (found.couplings[place].move_support(problem.measures[place].support.double()) for place in (0, 1))
    assert same_rows(first, second), (first, second)
    assert same_rows(found.measure.support, first)


def a_copy_in_another_order_is_found(name, kind, scale, dtype, size, seed, slices):
    check_copy(name, kind, scale, dtype, size, seed, slices)


def small_neurons_beside_large_ones_are_told_apart(name, scale, size, seed):
    check_copy(name, "tiny beside huge", scale, torch.float64, size, seed, 0)


def whatever_is_fused_the_result_is_finite_and_a_weight_of_one_returns_its_source(
    name, kinds, scales, dtype, size, weights, seed
):
    measures = tuple(measure_of(*each, dtype, seed + place) for place, each in enumerate(_with(kinds, size, scales)))
    problem = BarycenterProblem(measures, weights, size, seed=seed)
    solver = solver_of(name)
    found = solver.solve(problem)
    assert_right(problem, found, solver.has_free_masses)
    for place in (0, 1):
        if weights[place] == 1 and 0 in weights:
            coupling = found.couplings[place]
            assert coupling.is_permutation
            assert torch.equal(found.measure.support, measures[place].support[coupling.partners()])


def _with(kinds: Sequence[str], size: int, scales: Sequence[float]) -> list[tuple[str, int, float]]:
    return [(kind, size, scale) for kind, scale in zip(kinds, scales, strict=True)]


def widths_that_differ_have_right_marginals_at_any_scale(name, sizes, size, scale, seed):
    measures = tuple(measure_of("plain", each, scale, torch.float32, seed + each) for each in sizes)
    weights = tuple(1 / len(sizes) for _ in sizes)
    solver = replace(solver_of(name), keep_apart=False)  # type: ignore[type-var]
    problem = BarycenterProblem(measures, weights, size, seed=seed)
    assert_right(problem, solver.solve(problem), solver.has_free_masses)


# Each law with what its arguments are drawn from.
LAWS: dict[Callable[..., None], tuple[st.SearchStrategy, ...]] = {}
LAWS[a_copy_in_another_order_is_found] = (
    st.sampled_from(SOLVERS),
    st.sampled_from([kind for kind in KINDS if kind != "tiny beside huge"]),
    st.sampled_from(SCALES),
    st.sampled_from(DTYPES),
    st.integers(1, 6),
    SEEDS,
    st.integers(0, 1),
)
LAWS[small_neurons_beside_large_ones_are_told_apart] = (
    st.sampled_from(["wb", "otfusion"]),
    st.sampled_from(SCALES),
    st.integers(1, 8),
    SEEDS,
)
LAWS[whatever_is_fused_the_result_is_finite_and_a_weight_of_one_returns_its_source] = (
    st.sampled_from(SOLVERS),
    st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    st.tuples(st.sampled_from(SCALES), st.sampled_from(SCALES)),
    st.sampled_from(DTYPES),
    st.integers(1, 5),
    st.sampled_from([(0.5, 0.5), (1.0, 0.0), (0.0, 1.0), (1e-300, 1.0)]),
    SEEDS,
)
LAWS[widths_that_differ_have_right_marginals_at_any_scale] = (
    st.sampled_from(["wb", "gwb", "refinement"]),
    st.lists(st.integers(1, 5), min_size=2, max_size=3),
    st.integers(1, 5),
    st.sampled_from(SCALES),
    SEEDS,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("draws", [30, pytest.param(400, marks=pytest.mark.slow)])
def test_law(law: Callable[..., None], draws: int) -> None:
    settings(deadline=None, max_examples=draws)(given(*LAWS[law])(law))()


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("scale", [2.0**66, 2.0**-66, 2.0**100])
def test_couplings_and_costs_follow_the_scale(name: str, scale: float) -> None:
    plain = random_problem((6, 6), slices=1, seed=3)
    scaled = replace(
        plain,
        measures=tuple(
            NeuronMeasure.uniform((each.support * scale).float(), (each.structure * scale).float())
            for each in plain.measures
        ),
    )
    ours, theirs = (solver_of(name).solve(problem) for problem in (plain, scaled))
    for one, other in zip(ours.couplings, theirs.couplings, strict=True):
        assert torch.equal(one.partners(), other.partners())
    assert theirs.cost == pytest.approx(ours.cost * scale**2, rel=1e-4)
    assert theirs.stats["objective"][-1] == pytest.approx(theirs.cost)
    assert theirs.measure.support.dtype == torch.float32


@pytest.mark.parametrize("epsilon", [0.5, 0.05])
@pytest.mark.parametrize("scale", [1e20, 1e-30])
def test_epsilon_is_relative_to_the_cost_at_any_scale(epsilon: float, scale: float) -> None:
    plain = random_problem((6, 6), seed=4)
    scaled = replace(plain, measures=tuple(NeuronMeasure.uniform(each.support * scale) for each in plain.measures))
    solver = default_manager().get("solver", "otfusion")(epsilon=epsilon)
    plans = [solver.solve(problem).couplings[1].transport_plan() for problem in (plain, scaled)]
    torch.testing.assert_close(*plans, atol=1e-8, rtol=0)


@pytest.mark.parametrize(("sizes", "dtype"), [((5, 5), torch.float32), ((5, 7), torch.float64)])
@pytest.mark.parametrize("options", [{"epsilon": 1e-300}, {"epsilon": 1e300}, {"alpha": 1e9}, {"alpha": 1e-300}])
def test_options_at_the_ends_of_their_range(options: dict[str, float], dtype: torch.dtype, sizes: tuple[int, int]):
    for name in ("gwb",) if "alpha" in options else ("wb", "otfusion", "gwb"):
        problem = random_problem(sizes, slices=int(name == "gwb"), dtype=dtype)
        found = default_manager().get("solver", name)(**options).solve(problem)
        assert_right(problem, found)
        exact = default_manager().get("solver", name)(**{**options, "epsilon": 0.0}).solve(problem)
        assert found.cost >= exact.cost * (1 - 1e-4)
        if options.get("epsilon") == 1e-300:
            assert found.cost <= exact.cost * (1 + 1e-4)


def test_ordinary_measures_reach_a_solver_as_they_are() -> None:
    seen = []

    class Looking(AbstractBarycenterSolver):
        name = "looking"
        scope = Scope.INCOMING

        def find(self, problem: BarycenterProblem) -> Solution:
            seen.append(problem)
            return Solution(tuple(Permutation.identity(problem.size) for _ in problem.measures))

    problem = random_problem((4, 4), dtype=torch.float32)
    Looking().solve(problem)
    huge = replace(problem, measures=tuple(NeuronMeasure.uniform(each.support * 1e25) for each in problem.measures))
    Looking().solve(huge)
    assert seen[0] is problem
    assert seen[1].measures[0].support.dtype == torch.float64
    assert 0.5 <= float(max(each.support.abs().max() for each in seen[1].measures)) <= 2


def coupled(cost: torch.Tensor, prefer: Coupling | None = None) -> list[int]:
    return couple(cost, prefer=prefer).partners().tolist()


@pytest.mark.parametrize("size", [2, 16, 64])
def test_a_permutation_is_kept_for_rounding_alone(size: int) -> None:
    # All orders of two neurons cost the same but for a part in a thousand: far above rounding, far below the cost.
    cost = torch.ones(size, size)
    cost[0, 1] = cost[1, 0] = 1 - 1e-3
    swapped = [1, 0, *range(2, size)]
    assert coupled(cost)[:2] == [1, 0]
    assert coupled(cost, Permutation.identity(size))[:2] == [1, 0]
    cost[0, 1] = cost[1, 0] = 1 - 2e-7
    assert coupled(cost) == list(range(size))
    assert coupled(cost, Permutation(torch.tensor(swapped))) == swapped


def test_a_large_neuron_that_stays_does_not_hide_the_others() -> None:
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    rows[0] *= 1e6
    order = torch.tensor([0, 3, 1, 5, 2, 4])
    assert coupled(ground_cost(rows[order], rows)) == order.tolist()


def test_a_cost_that_no_number_holds_is_told() -> None:
    problem = random_problem((3, 3))
    problem.measures[1].support.mul_(1e200)
    with pytest.raises(Exception, match="found couplings of cost inf"):
        solver_of("wb").solve(problem)


def test_a_solver_made_by_hand_is_held_to_its_options() -> None:
    with pytest.raises(RecipeError, match="Option keep_apart of solver 'wb' is 'false': true or false"):
        replace(solver_of("wb"), keep_apart="false")  # type: ignore[type-var]
