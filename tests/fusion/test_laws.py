"""The laws of a fusion: recovery, idempotence, one-hot weights, aligned sources; planted duplicates stand apart."""

import copy
from collections.abc import Callable

import pytest
import torch
from nets import NETS, Mlp, ResNet
from signed import traced_once
from torch import Tensor, nn

from mergekit_ot import fuse, trace_model
from mergekit_ot.graph.symmetry.permutation import random_orders, reorder_state
from mergekit_ot.hooks.manager import default_manager

SOLVERS = ("wb", "otfusion", "gwb", "refinement", "weight-matching", "activation-matching", "zip")
FUSIBLE = (
    "mlp",
    "cnn",
    "resnet_a",
    "resnet_b",
    "densenet",
    "mobile",
    "grouped",
    "shuffle",
    "residual_mlp",
    "attention",
)

pytestmark = pytest.mark.usefixtures(traced_once.__name__)


def trained_like(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model whose norms and statistics are far from their blind initial values."""
    torch.manual_seed(seed)
    model = make().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.copy_(torch.rand(tensor.shape) + 0.5 if "var" in name else torch.randn(tensor.shape))
    return model


def planted_copy(model: nn.Module, inputs: tuple[Tensor, ...], seed: int = 0) -> nn.Module:
    """The same function with every neuron group in a random order."""
    graph = trace_model(model, inputs)
    moved = copy.deepcopy(model)
    orders = random_orders(graph, torch.Generator().manual_seed(seed))
    moved.load_state_dict(reorder_state(model.state_dict(), graph, orders))
    return moved


def outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        return model(*inputs)


def assert_same_function(one: nn.Module, other: nn.Module, inputs: tuple[Tensor, ...], tolerance: float = 1e-4) -> None:
    ours, theirs = outputs(one, inputs), outputs(other, inputs)
    error = float((ours - theirs).abs().max() / theirs.abs().max())
    assert error <= tolerance


def calibration(inputs: tuple[Tensor, ...]) -> list[tuple[tuple[Tensor, ...]]]:
    torch.manual_seed(9)
    return [(tuple(torch.randn(32, *x.shape[1:]) for x in inputs),) for _ in range(3)]


@pytest.mark.parametrize("name", FUSIBLE)
@pytest.mark.parametrize("solver", ["wb", pytest.param("activation-matching", marks=pytest.mark.slow)])
def test_a_model_fused_with_its_planted_copy_returns_its_function(name: str, solver: str) -> None:
    net = NETS[name]
    model = trained_like(net.make, 0)
    other = planted_copy(model, net.inputs)
    assert not torch.equal(next(iter(other.parameters())), next(iter(model.parameters())))
    result = fuse([model, other], solver=solver, example_inputs=net.inputs, data=calibration(net.inputs))
    assert_same_function(result.model(), model, net.inputs)
    assert result.aligned_sources_max_error is not None
    assert result.aligned_sources_max_error < 1e-4


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_recovers_a_planted_order(solver: str) -> None:
    model = trained_like(lambda: Mlp((9, 20, 15, 3)), 1)
    inputs = (torch.randn(4, 9),)
    other = planted_copy(model, inputs)
    result = fuse([model, other], solver=solver, example_inputs=inputs, data=calibration(inputs))
    assert_same_function(result.model(), model, inputs)


def test_vanilla_averaging_does_not_recover_a_planted_order() -> None:
    """The control of the law above: without alignment the planted copy destroys the function."""
    model = trained_like(lambda: Mlp((9, 20, 15, 3)), 1)
    inputs = (torch.randn(4, 9),)
    result = fuse([model, planted_copy(model, inputs)], solver="average", example_inputs=inputs)
    with pytest.raises(AssertionError):
        assert_same_function(result.model(), model, inputs, 1e-2)


@pytest.mark.parametrize("solver", [*SOLVERS, "average"])
@pytest.mark.parametrize("name", ["cnn", "resnet_a", "grouped"])
def test_a_model_fused_with_itself_is_itself(name: str, solver: str) -> None:
    net = NETS[name]
    model = trained_like(net.make, 2)
    result = fuse([model, model], solver=solver, example_inputs=net.inputs, data=calibration(net.inputs))
    for key, tensor in model.state_dict().items():
        assert torch.allclose(result.state[key], tensor, atol=1e-6), key


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("one", [0, 1])
def test_one_hot_model_weights_return_that_source(solver: str, one: int) -> None:
    net = NETS["cnn"]
    models = [trained_like(net.make, seed) for seed in (3, 4)]
    weights = [1.0 - one, float(one)]
    result = fuse(models, solver=solver, example_inputs=net.inputs, data=calibration(net.inputs), model_weights=weights)
    assert_same_function(result.model(), models[one], net.inputs)


@pytest.mark.parametrize("solver", ["wb", "otfusion", "gwb", "activation-matching"])
def test_the_order_of_two_sources_does_not_matter(solver: str) -> None:
    net = NETS["cnn"]
    models = [trained_like(net.make, seed) for seed in (5, 6)]
    options = {"solver": solver, "example_inputs": net.inputs, "data": calibration(net.inputs)}
    assert_same_function(fuse(models, **options).model(), fuse(models[::-1], **options).model(), net.inputs, 1e-3)


@pytest.mark.parametrize("name", FUSIBLE)
def test_aligned_sources_compute_what_the_sources_compute(name: str) -> None:
    net = NETS[name]
    models = [trained_like(net.make, seed) for seed in (7, 8, 9)]
    result = fuse(models, solver="wb", example_inputs=net.inputs)
    for number, model in enumerate(models):
        aligned = net.make().eval()
        aligned.load_state_dict(result.aligned_state(number))
        assert_same_function(aligned, model, net.inputs)
    assert result.aligned_sources_max_error is not None
    assert result.aligned_sources_max_error < 1e-4


@pytest.mark.parametrize("target", [0, 1])
def test_sources_of_different_width_fuse_into_either(target: int) -> None:
    models = [trained_like(lambda w=w: ResNet(w), w) for w in (4, 6)]
    result = fuse(models, solver="wb", example_inputs=NETS["resnet_b"].inputs, target=target)
    expected = models[target].state_dict()
    assert {k: v.shape for k, v in result.state.items()} == {k: v.shape for k, v in expected.items()}
    assert torch.isfinite(outputs(result.model(), NETS["resnet_b"].inputs)).all()


def test_the_target_may_be_an_architecture_of_its_own_size() -> None:
    models = [trained_like(lambda w=w: Mlp((9, w, 10, 3)), w) for w in (12, 16)]
    result = fuse(models, solver="wb", example_inputs=torch.randn(2, 9), target=Mlp((9, 14, 7, 3)))
    assert result.state["layers.0.weight"].shape == (14, 9)
    assert result.state["layers.1.weight"].shape == (7, 14)


def test_integer_buffers_come_from_the_first_source() -> None:
    net = NETS["cnn"]
    models = [trained_like(net.make, seed) for seed in (12, 13)]
    models[0].norm1.num_batches_tracked.fill_(7)
    models[1].norm1.num_batches_tracked.fill_(100)
    result = fuse(models, solver="wb", example_inputs=net.inputs)
    assert int(result.state["norm1.num_batches_tracked"]) == 7
    assert result.state["norm1.num_batches_tracked"].dtype == torch.int64


def test_inputs_stay_untouched_and_the_same_seed_gives_the_same_result() -> None:
    net = NETS["resnet_a"]
    models = [trained_like(net.make, seed) for seed in (14, 15)]
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in models]
    first, second = (fuse(models, solver="weight-matching", example_inputs=net.inputs, seed=3) for _ in range(2))
    for model, kept in zip(models, before, strict=True):
        assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(v, second.state[k]) for k, v in first.state.items())


def test_half_precision_is_computed_in_single_and_cast_back() -> None:
    half = [trained_like(lambda: Mlp((9, 12, 10, 3)), seed).bfloat16() for seed in (16, 17, 18)]
    inputs = torch.randn(2, 9)
    fused = fuse(half, solver="wb", example_inputs=inputs.bfloat16()).state
    single = fuse([copy.deepcopy(model).float() for model in half], solver="wb", example_inputs=inputs).state
    for name, tensor in fused.items():
        assert tensor.dtype == torch.bfloat16
        # Rounded once, at the end.
        assert torch.equal(tensor, single[name].bfloat16()), name


class Tied(nn.Module):
    """Two maps of one weight and biases of their own, whose neurons are free to move together."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(5, 7), nn.Linear(5, 7), nn.Linear(7, 2)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)) + torch.tanh(self.second(x)))


def test_tied_parameters_stay_tied_and_move_under_all_their_names() -> None:
    inputs = (torch.randn(3, 5),)
    model = trained_like(Tied, 19)
    result = fuse([model, planted_copy(model, inputs)], solver="wb", example_inputs=inputs)
    assert [report.name for report in result.groups] == ["first.weight:0"]
    assert_same_function(result.model(), model, inputs)
    # With an unrelated source the fused weight is neither source's own, under either name.
    mixed = fuse([model, trained_like(Tied, 20)], solver="wb", example_inputs=inputs)
    for each in (result, mixed):
        for state in (each.state, each.aligned_state(0), each.aligned_state(1)):
            assert torch.equal(state["second.weight"], state["first.weight"])
        assert each.aligned_sources_max_error is not None
        assert each.aligned_sources_max_error < 1e-5


def test_all_registered_solvers_are_under_the_laws() -> None:
    assert set(default_manager().solvers) == {*SOLVERS, "average"}
