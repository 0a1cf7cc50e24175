"""Sweeps, refinement and restarts, and the objective of the whole alignment that they lower."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from mergeot_matching.solver import WeightMatchingSolver
from nets import Cnn, Mlp, ResNet
from signed import ROWS, SEQUENCES, Recurrent, TanhStream, planted_signs, randomised, relative_error, traced_once
from torch import Tensor, nn

from mergekit_ot import Coupling, FusionResult, PluginManager, RecipeError, fuse, hookimpl
from mergekit_ot.fusion.tensors import SourceTensors, alignment_objective

IMAGES, ROWS6 = torch.randn(2, 1, 8, 8), torch.randn(3, 6)

pytestmark = pytest.mark.usefixtures(traced_once.__name__)

# Each takes how much wider its groups are.
NETWORKS: dict[str, tuple[Callable[..., nn.Module], Tensor]] = {
    "mlp": (lambda more=0: Mlp((6, 8 + more, 7 + more, 3)), ROWS6),
    "cnn": (lambda more=0: Cnn(6 + more, 8 + more, 7 + more), IMAGES),
    "resnet": (lambda more=0: ResNet(4 + more), torch.randn(2, 3, 8, 8)),
    "residual": (lambda: TanhStream(), ROWS),
    "rnn": (lambda more=0: Recurrent(nn.RNN, 6 + more), SEQUENCES),
}


def network(name: str, seed: int, more: int = 0) -> nn.Module:
    make = NETWORKS[name][0]
    return randomised(make(more) if more else make(), seed)


def fused(name: str, *seeds: int, **options: object) -> FusionResult:
    return fuse([network(name, seed) for seed in seeds], example_inputs=NETWORKS[name][1], **options)  # type: ignore[arg-type]


def objective(result: FusionResult, structure_weight: float = 1.0) -> float:
    weights = [1 / len(result.sources)] * len(result.sources)
    tensors = SourceTensors(result.sources, torch.device("cpu"))
    found = alignment_objective(tensors, result.alignment, weights, structure_weight)
    assert found is not None
    return found


@pytest.mark.parametrize(("name", "seeds"), [("mlp", (1, 2)), ("resnet", (1, 2, 3)), ("rnn", (1, 2)), ("rnn", (3, 4))])
def test_the_objective_is_the_squared_distance_of_aligned_sources_to_their_mean(
    name: str, seeds: tuple[int, ...]
) -> None:
    result = fused(name, *seeds, solver="gwb")
    states = [result.aligned_state(number) for number in range(len(seeds))]
    parameters = [key for key, _ in result.model().named_parameters()]
    for weight in (1.0, 2.0):
        expected = 0.0
        for key in parameters:
            mean = sum(state[key].double() for state in states) / len(states)
            spread = sum(float((state[key] - mean).square().sum()) for state in states) / len(states)
            expected += spread * (weight if key.startswith("cell.weight_hh") else 1.0)
        assert objective(result, weight) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("target", [0, 1])
def test_between_widths_it_is_the_transport_cost_of_densities(target: int) -> None:
    models = [randomised(Mlp((6, width, 3)), width) for width in (8, 5)]
    result = fuse(models, solver="wb", solver_options={"keep_apart": False}, example_inputs=ROWS6, target=target)
    size, expected = (8, 5)[target], 0.0
    for number, model in enumerate(models):
        state, (coupling,) = model.state_dict(), [each[number] for each in result.alignment.couplings.values()]
        assert isinstance(coupling, Coupling)
        plan = coupling.transport_plan()
        for j in range(size):
            for k in range(plan.shape[1]):
                made = torch.cat([state["layers.0.weight"][k], state["layers.0.bias"][k, None]])
                fused_made = torch.cat([result.state["layers.0.weight"][j], result.state["layers.0.bias"][j, None]])
                read = state["layers.1.weight"][:, k] * plan.shape[1] / size
                apart = (made - fused_made).square().sum() + (
                    read - result.state["layers.1.weight"][:, j]
                ).square().sum()
                expected += 0.5 * size * float(plan[j, k] * apart)
        expected += 0.5 * float((state["layers.1.bias"] - result.state["layers.1.bias"]).square().sum())
    assert objective(result) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_objective_of_copies_is_zero(name: str) -> None:
    make, inputs = NETWORKS[name]
    model = network(name, 5)
    result = fuse([model, planted_signs(model, make, inputs)], solver="gwb", example_inputs=inputs)
    assert objective(result) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(("solver", "alpha"), [("wb", 1.0), ("gwb", 2.0)])
@pytest.mark.parametrize("name", NETWORKS)
def test_refinement_is_never_worse(name: str, solver: str, alpha: float) -> None:
    seeds = (1, 2, 3) if name in ("mlp", "rnn") else (4, 5)
    before, after = fused(name, *seeds, solver=solver), fused(name, *seeds, solver=solver, refine=True)
    assert before.objectives == {}
    assert set(after.objectives) == {"before refinement", "after refinement"}
    assert after.objectives["before refinement"] == pytest.approx(objective(before, alpha))
    assert after.objectives["after refinement"] == pytest.approx(objective(after, alpha))
    assert after.objectives["after refinement"] <= after.objectives["before refinement"]
    assert after.aligned_sources_max_error is not None
    assert after.aligned_sources_max_error < 1e-5


@pytest.mark.parametrize("name", ["mlp", "cnn", "rnn"])
def test_refinement_is_never_worse_between_widths(name: str) -> None:
    models = [network(name, 1, 3), network(name, 2)]
    result = fuse(models, solver="wb", example_inputs=NETWORKS[name][1], target=1, refine=True)
    assert result.objectives["after refinement"] <= result.objectives["before refinement"]
    assert result.objectives["after refinement"] == pytest.approx(objective(result))


def test_refinement_gains_somewhere() -> None:
    found = fused("mlp", 1, 2, solver="wb", refine=True).objectives
    assert found["after refinement"] < 0.999 * found["before refinement"]


@pytest.mark.parametrize("name", ["mlp", "cnn", "rnn"])
def test_every_sweep_of_refinement_lowers_the_objective(name: str) -> None:
    """Its own law: from the identity, without the engine's choice of the better of two."""
    at_identity = objective(fused(name, 6, 7, solver="average"))
    limits = (1, 2, 100)
    found = [objective(fused(name, 6, 7, solver="refinement", solver_options={"max_sweeps": n})) for n in limits]
    assert all(after <= before * (1 + 1e-6) for before, after in zip([at_identity, *found], found, strict=False))
    assert found[-1] < at_identity


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_more_sweeps_never_worsen_the_objective(name: str) -> None:
    for seed in range(2):
        found = [
            objective(fused(name, seed, seed + 10, solver="wb", solver_options={"max_sweeps": limit}))
            for limit in (1, 2, 10)
        ]
        assert found[1] <= found[0] * (1 + 1e-6)
        assert found[2] <= found[1] * (1 + 1e-6)


def test_a_later_sweep_sees_what_reads_a_neuron() -> None:
    """Neurons that are made alike are told apart by what reads them, which the first sweep does not look at."""
    model = network("mlp", 8)
    with torch.no_grad():
        model.layers[0].weight.copy_(model.layers[0].weight[:1].expand(8, 6))
        model.layers[0].bias.fill_(0.1)
    make, inputs = NETWORKS["mlp"]
    models = [model, planted_signs(model, make, inputs)]
    once, twice = (
        fuse(models, solver="wb", solver_options={"max_sweeps": limit}, example_inputs=inputs) for limit in (1, 5)
    )
    assert objective(twice) < objective(once)


@pytest.mark.parametrize("solver", ["wb", "gwb"])
@pytest.mark.parametrize("name", ["mlp", "resnet"])
def test_a_planted_copy_refined_returns_its_function(name: str, solver: str) -> None:
    make, inputs = NETWORKS[name]
    model = network(name, 9)
    result = fuse([model, planted_signs(model, make, inputs)], solver=solver, example_inputs=inputs, refine=True)
    assert relative_error(result.model(), model, inputs) < 1e-5
    assert result.objectives["after refinement"] == pytest.approx(0, abs=1e-4)


def test_planted_signs_refined_return_the_function() -> None:
    model = network("rnn", 9)
    other = planted_signs(model, NETWORKS["rnn"][0], SEQUENCES)
    result = fuse([model, other], solver="gwb", example_inputs=SEQUENCES, refine=True)
    assert relative_error(result.model(), model, SEQUENCES) < 1e-5


class AtIdentity(WeightMatchingSolver):
    """Starts at the identity alone, so that the order of the groups decides where it ends."""

    tries_nothing = False


@pytest.mark.parametrize("seeds", [(3, 4), (5, 6)])
def test_of_several_restarts_the_least_objective_is_kept(seeds: tuple[int, int]) -> None:
    alone = [fused("mlp", *seeds, solver=AtIdentity(), seed=seed) for seed in range(4)]
    values = list(map(objective, alone))
    assert len({round(value, 4) for value in values}) > 1
    kept = fused("mlp", *seeds, solver=AtIdentity(), seed=0, restarts=4)
    assert kept.objectives == {"aligned": pytest.approx(min(values))}
    assert objective(kept) == pytest.approx(min(values))
    # The first is the best of one pair, and the worst of the other.
    best = alone[values.index(min(values))]
    assert all(torch.equal(kept.state[key], tensor) for key, tensor in best.state.items())
    both = fused("mlp", *seeds, solver=AtIdentity(), seed=0, restarts=4, refine=True)
    assert both.objectives["before refinement"] == both.objectives["aligned"] == pytest.approx(min(values))


@pytest.mark.parametrize("seeds", [(3, 4), (5, 6)])
def test_restarts_try_both_starts(seeds: tuple[int, int]) -> None:
    """Weight matching starts from nothing first; the further alignments start at the identity."""
    once = objective(fused("mlp", *seeds, solver="weight-matching"))
    at_identity = [objective(fused("mlp", *seeds, solver=AtIdentity(), seed=seed)) for seed in (1, 2, 3)]
    several = fused("mlp", *seeds, solver="weight-matching", restarts=4)
    assert several.objectives["aligned"] == pytest.approx(min(once, *at_identity))


def test_more_restarts_are_never_worse() -> None:
    found = [fused("cnn", 1, 2, solver="refinement", restarts=n).objectives["aligned"] for n in (2, 4, 6)]
    assert found == sorted(found, reverse=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver_options": {"members": "last"}}, "members .* is 'last': 'all' or 'first'"),
        ({"solver_options": {"scaling": "none"}}, "scaling .* is 'none': 'density' or 'paper'"),
        ({"solver_options": {"max_sweeps": 0}}, "max_sweeps"),
        ({"restarts": 0}, "restarts=0"),
    ],
)
@pytest.mark.parametrize("solver", ["wb", "gwb"])
def test_values_that_there_are_not_are_refused(solver: str, options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        fused("mlp", 1, 2, solver=solver, **options)


def test_a_broken_solver_of_another_plugin_takes_no_refinement_away() -> None:
    manager = PluginManager.load()
    broken = hookimpl(lambda: {"broken": "no_such_module:Solver", "no-class": len})
    manager.register(SimpleNamespace(mergeot_solvers=broken), "theirs")
    assert "after refinement" in fused("mlp", 1, 2, solver="wb", refine=True, manager=manager).objectives


def test_refinement_needs_one_solver_that_refines() -> None:
    manager = PluginManager.load()
    manager.register(
        SimpleNamespace(mergeot_solvers=hookimpl(lambda: {"mine": "mergeot_gromov.refinement:RefinementSolver"})),
        "mine",
    )
    with pytest.raises(RecipeError, match=r"There are several: mine, refinement\."):
        fused("mlp", 1, 2, solver="wb", refine=True, manager=manager)
