"""What is kept from one source is that source's, in the order of the fused neurons; everything else is fused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from nets import NETS, Cnn, Mlp
from signed import traced_once
from torch import Tensor, nn

from mergekit_ot import AbstractRepair, FusionResult, PluginManager, RecipeError, RepairContext, fuse, hookimpl
from mergekit_ot.errors import GraphMismatchError

pytestmark = pytest.mark.usefixtures(traced_once.__name__)

INPUTS = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(1))
SOLVERS = ("average", "otfusion", "wb", "gwb", "weight-matching", "activation-matching")


def mlp(seed: int, sizes: tuple[int, ...] = (6, 8, 5, 3)) -> nn.Module:
    torch.manual_seed(seed)
    return Mlp(sizes).eval()


def fused(models: list[nn.Module], solver: str = "wb", **options: object) -> FusionResult:
    return fuse(models, solver=solver, example_inputs=INPUTS, data=[(INPUTS,)], **options)  # type: ignore[arg-type]


def is_equal(one: Tensor, other: Tensor) -> bool:
    return torch.equal(one, other)


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_kept_from_the_first_is_the_first_bit_for_bit(solver: str) -> None:
    models = [mlp(0), mlp(1)]
    result = fused(models, solver, keep=["*"])
    assert all(is_equal(result.state[name], value) for name, value in models[0].state_dict().items())


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_kept_from_another_is_that_one_aligned(solver: str) -> None:
    models = [mlp(0), mlp(1)]
    result = fused(models, solver, keep=["*=1"])
    aligned = result.aligned_state(1)
    assert all(is_equal(result.state[name], aligned[name]) for name in aligned)
    assert torch.allclose(result.model()(INPUTS), models[1](INPUTS), atol=1e-6)


@pytest.mark.parametrize("name", ["cnn", "resnet_b", "grouped", "attention"])
def test_kept_parameters_and_buffers_are_those_of_the_aligned_source(name: str) -> None:
    net = NETS[name]
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(net.make().eval())
    result = fuse(models, solver="wb", example_inputs=net.inputs, keep=["*=1"])
    aligned = result.aligned_state(1)
    assert all(is_equal(result.state[key], aligned[key]) for key in aligned)
    assert torch.allclose(result.model()(*net.inputs), models[1](*net.inputs), atol=1e-4)


@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_not_kept_is_fused_as_without(solver: str) -> None:
    models = [mlp(0), mlp(1)]
    plain, kept = fused(models, solver), fused(models, solver, keep=["layers.1.*=1"])
    aligned = kept.aligned_state(1)
    for name in plain.state:
        expected = aligned if name.startswith("layers.1.") else plain.state
        assert is_equal(kept.state[name], expected[name]), name
    assert any("layers.1.weight" in note for note in kept.notes)


def test_buffers_are_kept_too() -> None:
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        model = Cnn().eval()
        model.norm1.running_mean = torch.randn(6)
        model.norm1.num_batches_tracked.fill_(seed + 3)
        models.append(model)
    result = fuse(models, solver="wb", example_inputs=NETS["cnn"].inputs, keep=["norm1.*=1"])
    assert is_equal(result.state["norm1.running_mean"], result.aligned_state(1)["norm1.running_mean"])
    assert int(result.state["norm1.num_batches_tracked"]) == 4


@pytest.mark.parametrize("solver", SOLVERS)
def test_all_but_heads_of_different_classes_is_fused(solver: str) -> None:
    models = [mlp(0), mlp(1, (6, 8, 5, 7))]
    result = fused(models, solver, keep=["layers.2.*"])
    first, second = (result.aligned_state(source) for source in range(2))
    for name, value in result.state.items():
        expected = first[name] if name.startswith("layers.2.") else (first[name] + second[name]) / 2
        assert torch.allclose(value, expected), name
    # The aligned copy of the other source has its own head, and was compared with it.
    assert second["layers.2.weight"].shape == (7, 5)
    assert result.aligned_sources_max_error is not None
    assert result.aligned_sources_max_error < 1e-5


def test_heads_of_other_classes_change_no_coupling_of_what_is_before_them() -> None:
    models = [mlp(0), mlp(1, (6, 8, 5, 7))]
    twin = mlp(1)
    before = {name: value for name, value in models[1].state_dict().items() if not name.startswith("layers.2.")}
    twin.load_state_dict({**twin.state_dict(), **before})
    plain, kept = fused([models[0], twin]), fused(models, keep=["layers.2.*"])
    assert all(is_equal(plain.state[name], kept.state[name]) for name in before)


@pytest.mark.parametrize("solver", ["wb", "gwb"])
def test_widths_may_differ_besides(solver: str) -> None:
    models = [mlp(0), mlp(1, (6, 10, 4, 7))]
    result = fused(models, solver, keep=["layers.2.*=0"])
    assert is_equal(result.state["layers.2.weight"], result.aligned_state(0)["layers.2.weight"])
    assert result.aligned_state(1)["layers.2.weight"].shape == (7, 5)


def test_what_is_kept_of_a_wider_source_reads_the_fused_neurons() -> None:
    # Every hidden neuron twice, with half the outgoing weight: the same function at twice the width.
    narrow, wide = mlp(0, (6, 5, 3)), mlp(1, (6, 10, 3))
    state = narrow.state_dict()
    wide.load_state_dict(
        {
            "layers.0.weight": state["layers.0.weight"].repeat(2, 1),
            "layers.0.bias": state["layers.0.bias"].repeat(2),
            "layers.1.weight": state["layers.1.weight"].repeat(1, 2) / 2,
            "layers.1.bias": state["layers.1.bias"],
        }
    )
    result = fused([narrow, wide], keep=["layers.1.*=1"])
    assert torch.allclose(result.state["layers.1.weight"], state["layers.1.weight"], atol=1e-6)


@pytest.mark.parametrize("solver", SOLVERS)
def test_vocabularies_may_differ_where_they_are_kept(solver: str) -> None:
    class Language(nn.Module):
        def __init__(self, vocabulary: int) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(vocabulary, 6), nn.Linear(6, vocabulary)
            self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.embedding(tokens)
            return self.head(x + self.down(self.up(self.norm(x)).relu()))

    models: list[nn.Module] = []
    for seed, vocabulary in enumerate((7, 9)):
        torch.manual_seed(seed)
        models.append(Language(vocabulary).eval())
    options = {"solver": solver, "example_inputs": TOKENS, "data": [(TOKENS,)]}
    result = fuse(models, keep=["embedding.*", "head.*"], **options)  # type: ignore[arg-type]
    assert is_equal(result.state["embedding.weight"], result.aligned_state(0)["embedding.weight"])
    assert result.aligned_state(1)["head.weight"].shape == (9, 6)
    assert result.aligned_sources_max_error is not None
    assert result.aligned_sources_max_error < 1e-5


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.up, self.down = nn.Linear(6, 9), nn.Linear(9, 6)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.head(x + self.down(self.up(x).relu()))


def test_tied_tensors_are_kept_under_all_their_names() -> None:
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        models.append(Tied().eval())
    result = fuse(models, solver="wb", example_inputs=TOKENS, keep=["head.*=1"])
    for name in ("head.weight", "embedding.weight"):
        assert is_equal(result.state[name], result.aligned_state(1)["embedding.weight"])
    with pytest.raises(RecipeError, match="one parameter"):
        fuse(models, solver="wb", example_inputs=TOKENS, keep=["head.*=1", "embedding.*"])


@pytest.mark.parametrize(
    ("keep", "match"),
    [
        (["layer.9.*"], r"No parameter matches 'layer\.9\.\*'"),
        (["layers.2"], r"No parameter is called 'layers\.2'; those of that module are 'layers\.2\.\*'"),
        (["layers.2.*", "*.bias=1"], r"'layers\.2\.bias' is to be kept from 'source 0' and from 'source 1'"),
        (["layers.2.*=c.pt"], r"'c\.pt' is none of the models\. They are: 0 \(source 0\), 1 \(source 1\)"),
        (["layers.2.*=2"], r"'2' is none of the models"),
    ],
)
def test_what_does_not_fit_is_refused(keep: list[str], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        fused([mlp(0), mlp(1)], keep=keep)


def test_close_names_are_listed() -> None:
    with pytest.raises(RecipeError, match=r"layers\.0\.weight"):
        fused([mlp(0), mlp(1)], keep=["layer.0.weight"])


def test_what_is_kept_has_the_sizes_of_the_target() -> None:
    models = [mlp(0), mlp(1, (6, 8, 5, 7))]
    with pytest.raises(RecipeError, match=r"shape \(7, 5\).*--target 1"):
        fused(models, keep=["layers.2.*=1"])
    result = fused(models, keep=["layers.2.*"], target=1)
    assert is_equal(result.state["layers.2.weight"], result.aligned_state(1)["layers.2.weight"])
    assert result.state["layers.2.weight"].shape == (7, 5)


def test_what_differs_and_is_not_kept_is_refused() -> None:
    with pytest.raises(GraphMismatchError, match=r"'layers\.2\.bias', axis 0"):
        fused([mlp(0), mlp(1, (6, 8, 5, 7))], keep=["layers.2.weight"])


@pytest.mark.parametrize("repair", ["refit", "repair", "rescale"])
def test_a_repair_leaves_alone_what_is_kept(repair: str) -> None:
    inputs = torch.randn(300, 6, generator=torch.Generator().manual_seed(2))
    models = [mlp(0), mlp(1, (6, 8, 5, 7))]
    result = fuse(
        models,
        solver="wb",
        data=[(each,) for each in inputs.split(50)],
        repair=repair,
        keep=["layers.0.*", "layers.2.*"],
    )
    aligned = result.aligned_state(0)
    kept = [name for name in aligned if not name.startswith("layers.1.")]
    assert all(is_equal(result.state[name], aligned[name]) for name in kept)


class Zeros(AbstractRepair):
    """Leaves nothing as it was."""

    needs_data = False

    def repair(self, context: RepairContext) -> dict[str, Tensor]:
        return {name: torch.zeros_like(value) for name, value in context.fused.items()}


def test_no_repair_of_a_plugin_changes_what_is_kept() -> None:
    manager = PluginManager.load()
    manager.register(SimpleNamespace(mergeot_repairs=hookimpl(lambda: {"zeros": Zeros})), "zeros")
    result = fuse([mlp(0), mlp(1)], example_inputs=INPUTS, repair="zeros", keep=["layers.0.*"], manager=manager)
    assert is_equal(result.state["layers.0.weight"], result.aligned_state(0)["layers.0.weight"])
    assert not result.state["layers.1.weight"].any()
