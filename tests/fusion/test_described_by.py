"""Choices of what describes a neuron: the first layer of a stream, the paper's scaling, masses by importance."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Mlp, ResNet
from signed import ROWS, TanhStream, randomised, trace_once, traced_once
from torch import Tensor, nn

from mergekit_ot import Coupling, FusionResult, GroupView, NeuronMeasure, Permutation, Plan, Scope, fuse
from mergekit_ot.fusion.alignment import Alignment
from mergekit_ot.hooks.manager import default_manager

VECTORS = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
STREAM = "embed.weight:0"

pytestmark = pytest.mark.usefixtures(traced_once.__name__)


def plan_of(result: FusionResult, group: str, source: int) -> Tensor:
    coupling = result.alignment.couplings[group][source]
    assert isinstance(coupling, Coupling)
    return coupling.transport_plan(torch.zeros(1, dtype=torch.float64))


def streams(**options: object) -> Tensor:
    """How the stream of one residual network is coupled with that of another."""
    models = [randomised(TanhStream(), seed) for seed in (1, 2)]
    changed = options.pop("changed", None)
    if changed is not None:
        tensor = models[1].get_parameter(str(changed))
        with torch.no_grad():
            tensor.copy_(100 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)))
    result = fuse(models, solver="wb", solver_options=options, example_inputs=ROWS)
    return plan_of(result, STREAM, 1)


@pytest.mark.parametrize("members", ["all", "first"])
def test_the_first_layer_of_a_stream_decides_alone_only_where_asked_to(members: str) -> None:
    before = streams(members=members)
    other = streams(members=members, changed="down.bias")
    assert torch.equal(before, other) == (members == "first")
    assert not torch.equal(before, streams(members=members, changed="embed.weight"))
    assert not torch.equal(before, streams(members=members, changed="embed.bias"))


def test_of_several_convolutions_the_first_describes_a_stream() -> None:
    model = randomised(ResNet(), 0)
    graph = trace_once(model, torch.randn(2, 3, 8, 8))
    key = next(key for key, group in graph.free_groups.items() if group.members[0].parameter == "conv1.weight")
    others = {k: (Permutation.identity(g.size),) for k, g in graph.free_groups.items() if k != key}
    state = model.state_dict()
    alignment = Alignment((graph,), graph, others)

    def rows(members: str, scope: Scope) -> Tensor:
        view = GroupView(key, alignment, scope, lambda _, name: state[name], members=members)
        return view.weights(0)

    assert torch.equal(rows("first", Scope.INCOMING), state["conv1.weight"].flatten(1))
    assert rows("all", Scope.INCOMING).shape[1] > 27
    # What reads the stream describes it in either case.
    readers = rows("all", Scope.INCIDENT).shape[1] - rows("all", Scope.INCOMING).shape[1]
    assert rows("first", Scope.INCIDENT).shape[1] == 27 + readers
    assert readers > 0


@pytest.mark.parametrize("solver", ["wb", "gwb"])
def test_the_papers_scaling_is_the_same_between_equal_widths(solver: str) -> None:
    models = [randomised(Mlp(), seed) for seed in (1, 2)]
    plain, paper = (
        fuse(models, solver=solver, solver_options={"scaling": scaling}, example_inputs=VECTORS)
        for scaling in ("density", "paper")
    )
    for name, tensor in plain.state.items():
        torch.testing.assert_close(paper.state[name], tensor, msg=name)


@pytest.mark.parametrize("scaling", ["density", "paper"])
def test_between_unequal_widths_the_paper_averages_what_reads_as_well(scaling: str) -> None:
    models = [randomised(Mlp((6, width, 3)), width).double() for width in (5, 8)]
    options = {"scaling": scaling}
    result = fuse(models, solver="wb", solver_options=options, example_inputs=VECTORS.double())
    plan = plan_of(result, "layers.0.weight:0", 1)
    states = [model.state_dict() for model in models]
    incoming, outgoing, bias = (torch.zeros(shape, dtype=torch.float64) for shape in ((5, 6), (3, 5), (5,)))
    for j in range(5):
        for k in range(8):
            average = plan[j, k] / plan[j].sum()
            share = average if scaling == "paper" else plan[j, k] / plan[:, k].sum()
            incoming[j] += average * states[1]["layers.0.weight"][k]
            bias[j] += average * states[1]["layers.0.bias"][k]
            outgoing[:, j] += share * states[1]["layers.1.weight"][:, k]
    for name, moved in (("layers.0.weight", incoming), ("layers.0.bias", bias), ("layers.1.weight", outgoing)):
        torch.testing.assert_close(result.state[name], (states[0][name] + moved) / 2)
    mean = (states[0]["layers.1.bias"] + states[1]["layers.1.bias"]) / 2
    torch.testing.assert_close(result.state["layers.1.bias"], mean)


@pytest.mark.parametrize("scaling", ["density", "paper"])
def test_the_layer_behind_is_compared_in_the_same_scaling(scaling: str) -> None:
    models = [randomised(Mlp((6, width, 4, 3)), width) for width in (5, 8)]
    graphs = tuple(trace_once(model, VECTORS) for model in models)
    plan = torch.rand(5, 8, generator=torch.Generator().manual_seed(1))
    given = {"layers.0.weight:0": (Permutation.identity(5), Plan(plan / plan.sum()))}
    states = [model.state_dict() for model in models]
    alignment = Alignment(graphs, graphs[0], given, scaling=scaling)
    view = GroupView("layers.1.weight:0", alignment, Scope.INCOMING, lambda source, name: states[source][name])
    weights = plan / plan.sum(1, keepdim=True) if scaling == "paper" else plan / plan.sum(0)
    moved = states[1]["layers.1.weight"] @ weights.T
    torch.testing.assert_close(view.weights(1)[:, :5], moved)
    torch.testing.assert_close(view.weights(0)[:, :5], states[0]["layers.1.weight"])


def important(models: list[nn.Module], **options: object) -> FusionResult:
    return fuse(models, solver="wb", measure="importance", example_inputs=VECTORS.double(), **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("widths", [(5, 5), (5, 8)])
def test_masses_by_importance_are_in_proportion_to_the_norms_and_move_tensors(widths: tuple[int, int]) -> None:
    models = [randomised(Mlp((6, width, 3), bias=False), seed).double() for seed, width in enumerate(widths)]
    result = important(models)
    states = [model.state_dict() for model in models]
    incoming, outgoing = (torch.zeros(shape, dtype=torch.float64) for shape in ((5, 6), (3, 5)))
    for number, state in enumerate(states):
        plan = plan_of(result, "layers.0.weight:0", number)
        norms = state["layers.0.weight"].norm(dim=1)
        mass = norms / norms.sum()
        torch.testing.assert_close(plan.sum(0), mass)
        torch.testing.assert_close(plan.sum(1), torch.full((5,), 0.2, dtype=torch.float64))
        incoming += 0.5 * 5 * plan @ state["layers.0.weight"]
        # A neuron is shared out by where its mass goes, however much it has: W/μ.
        outgoing += 0.5 * (state["layers.1.weight"] / mass) @ plan.T
    torch.testing.assert_close(result.state["layers.0.weight"], incoming)
    torch.testing.assert_close(result.state["layers.1.weight"], outgoing)
    # What flows through all hidden neurons together is conserved.
    flow = 0.5 * sum(state["layers.1.weight"].sum(1) for state in states)
    torch.testing.assert_close(result.state["layers.1.weight"].sum(1), flow)


def test_important_copies_of_one_neuron_keep_the_function() -> None:
    """Where neurons that share mass compute the same nothing is lost: copies of one neuron, of different importance."""
    single = randomised(Mlp((6, 1, 3)), 0).double()
    copies = Mlp((6, 4, 3)).double().eval()
    copies.load_state_dict(
        {
            "layers.0.weight": single.layers[0].weight.expand(4, 6),  # type: ignore[index, union-attr]
            "layers.0.bias": single.layers[0].bias.expand(4),  # type: ignore[index, union-attr]
            "layers.1.weight": single.layers[1].weight * torch.tensor([[0.1, 0.2, 0.3, 0.4]]).double(),  # type: ignore[index, union-attr]
            "layers.1.bias": single.layers[1].bias,  # type: ignore[index, union-attr]
        }
    )
    fused = important([copies, copy.deepcopy(copies)]).model()
    inputs = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(fused(inputs), single(inputs))


def test_importance_of_neurons_without_weights_is_uniform() -> None:
    graph = trace_once(Mlp(), VECTORS)
    state = {name: torch.zeros_like(tensor) for name, tensor in Mlp().state_dict().items()}
    view = GroupView("layers.0.weight:0", Alignment((graph,), graph), Scope.INCOMING, lambda _, name: state[name])
    measure: NeuronMeasure = default_manager().get("measure", "importance")().measure(view)[0]
    torch.testing.assert_close(measure.mass, torch.full((8,), 1 / 8))
