"""The heads of all sources in one network: whose outputs stand where, what a repair makes of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import Mlp
from signed import traced_once
from torch import Tensor, nn

from mergekit_ot import MultiHead, RecipeError, fuse

pytestmark = pytest.mark.usefixtures(traced_once.__name__)

INPUTS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
SOLVERS = ("average", "otfusion", "wb", "gwb", "weight-matching", "activation-matching")


class Turned(nn.Module):
    """A convolutional network whose last layer gives a map per class."""

    def __init__(self, classes: int = 2) -> None:
        super().__init__()
        self.conv, self.last = nn.Conv2d(1, 4, 3), nn.Conv2d(4, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.conv(x).relu())


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return make().eval()


def pair(classes: tuple[int, int] = (3, 4)) -> list[nn.Module]:
    return [seeded(lambda own=own: Mlp((6, 8, 5, own)), seed) for seed, own in enumerate(classes)]


@pytest.mark.parametrize("classes", [(3, 4), (3, 3)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_the_last_layer_holds_the_aligned_heads_one_after_the_other(solver: str, classes: tuple[int, int]) -> None:
    models = pair(classes)
    result = fuse(models, solver=solver, example_inputs=INPUTS, data=[(INPUTS,)], head="both")
    aligned = [result.aligned_state(source) for source in range(2)]
    for name in ("layers.2.weight", "layers.2.bias"):
        assert torch.equal(result.state[name], torch.cat([state[name] for state in aligned]))
    assert torch.allclose(result.state["layers.0.weight"], sum(state["layers.0.weight"] for state in aligned) / 2)
    assert result.head_sizes == classes
    assert result.model()(INPUTS).shape == (4, sum(classes))
    assert result.aligned_sources_max_error is not None
    assert result.aligned_sources_max_error < 1e-5
    assert any(f"{classes[0]} to {sum(classes) - 1} are those of 'source 1'" in note for note in result.notes)


@pytest.mark.parametrize("kept", [0, 1])
def test_with_one_trunk_every_head_computes_what_its_source_does(kept: int) -> None:
    models = pair()
    result = fuse(models, example_inputs=INPUTS, head="both", keep=[f"layers.[01].*={kept}"])
    outputs = result.multi_head()(INPUTS)[kept]
    assert torch.allclose(outputs, models[kept](INPUTS), atol=1e-6)


def test_heads_of_one_source_twice_compute_the_same_twice() -> None:
    (model, _) = pair()
    first, second = fuse([model, model], example_inputs=INPUTS, head="both").multi_head()(INPUTS)
    assert torch.allclose(first, second)
    assert torch.allclose(first, model(INPUTS), atol=1e-6)


def test_more_than_two_heads_and_maps_of_classes() -> None:
    images = torch.randn(2, 1, 6, 6)
    models = [seeded(lambda own=own: Turned(own), own) for own in (2, 3, 4)]
    result = fuse(models, example_inputs=images, head="both")
    assert [outputs.shape[1] for outputs in result.multi_head()(images)] == [2, 3, 4]


def test_the_meaning_of_classes_plays_no_part_in_the_alignment() -> None:
    models = pair((3, 3))
    other = seeded(lambda: Mlp((6, 8, 5, 3)), 7)
    before = {name: value for name, value in models[1].state_dict().items() if "layers.2." not in name}
    other.load_state_dict({**other.state_dict(), **before})
    options = {"example_inputs": INPUTS, "solver": "weight-matching", "head": "both"}
    one, two = fuse(models, **options), fuse([models[0], other], **options)  # type: ignore[arg-type]
    assert all(torch.equal(one.state[name], two.state[name]) for name in before)


def test_refit_fits_every_head_to_its_own_source() -> None:
    inputs = torch.randn(1500, 6, generator=torch.Generator().manual_seed(3))
    models, data = pair(), [(each,) for each in inputs.split(100)]
    plain, refitted = (fuse(models, data=data, head="both", repair=repair) for repair in ("none", "refit"))
    goal = torch.cat([model(inputs) for model in models], 1)
    errors = [float((result.model()(inputs) - goal).detach().square().mean()) for result in (plain, refitted)]
    assert errors[1] < 0.7 * errors[0]
    assert refitted.repair_comparison is not None
    assert refitted.repair_comparison.is_written


def test_a_target_may_have_room_for_all() -> None:
    result = fuse(pair(), example_inputs=INPUTS, head="both", target=Mlp((6, 8, 5, 7)))
    assert result.state["layers.2.weight"].shape == (7, 5)
    with pytest.raises(RecipeError, match="3 \\+ 4 = 7 outputs in the sources, and 6 in the target"):
        fuse(pair(), example_inputs=INPUTS, head="both", target=Mlp((6, 8, 5, 6)))


class NoHead(nn.Module):
    """Gives out its embeddings, which also make the scores."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 6)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.table(tokens) @ self.table.weight.T


def test_a_network_without_a_head_of_its_own_is_refused() -> None:
    tokens = torch.randint(0, 7, (2, 3))
    with pytest.raises(RecipeError, match="heads of all models cannot be had"):
        fuse([seeded(NoHead, seed) for seed in range(2)], example_inputs=tokens, head="both")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"head": "all"}, "it is 'one' .* or 'both'"),
        ({"head": "both", "keep": ["layers.2.*"]}, "'layers.2.weight' is to be kept from one model"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, object], match: str) -> None:
    with pytest.raises(RecipeError, match=match):
        fuse(pair((3, 3)), example_inputs=INPUTS, **options)  # type: ignore[arg-type]


def test_a_wrapper_takes_a_written_state_and_a_network_of_any_classes() -> None:
    result = fuse(pair(), example_inputs=INPUTS, head="both")
    apart = MultiHead(Mlp((6, 8, 5, 2)), result.state, (3, 4))
    assert torch.equal(torch.cat(apart(INPUTS), 1), result.model()(INPUTS))
    with pytest.raises(RecipeError, match="does not hold 8 outputs"):
        MultiHead(Mlp((6, 8, 5, 2)), result.state, (4, 4))
    with pytest.raises(RecipeError, match="one head"):
        fuse(pair((3, 3)), example_inputs=INPUTS).multi_head()
