"""How often an architecture is built in a fusion, and that what is built is right in all that no file holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mergekit_ot import ArchitectureError, SourceModel, fuse, save_checkpoint
from mergekit_ot.fusion.architecture import KnownArchitecture
from mergekit_ot.hooks.manager import default_manager
from mergekit_ot.jobs.fusing import run_fuse
from mergekit_ot.recipe import FusionRecipe

INPUTS = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
# One with names and shapes alone, and one with values that is traced and then compared.
MOST = {"without memory": 1, "real": 1}


class Counted(nn.Module):
    """Counts its instances: those without memory, and real ones."""

    built: list[str] = []  # noqa: RUF012 - shared by all that is built

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.built.append("without memory" if self.first.weight.is_meta else "real")

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x)))


class Refusing(Counted):
    """Needs real tensors in its constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = float(self.first.weight.detach().abs().max())


class Timed(Counted):
    """Multiplies by rates that stand in no file, and that are computed when it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rates", 2.0 ** -torch.arange(6), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * self.rates)


class Summing(Counted):
    """Keeps, outside its state, what it computes of its first weights."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            nn.init.ones_(self.first.bias)
        self.register_buffer("total", self.first.bias.detach().sum(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.total


@pytest.fixture(autouse=True)
def _nothing_built() -> Iterator[None]:
    Counted.built.clear()
    yield
    Counted.built.clear()


def states(make: Callable[[], nn.Module]) -> list[dict[str, Tensor]]:
    torch.manual_seed(0)
    found = [make().state_dict() for _ in range(3)]
    Counted.built.clear()
    return found


def counts() -> dict[str, int]:
    return {kind: Counted.built.count(kind) for kind in MOST}


@pytest.mark.parametrize("solver", ["wb", "weight-matching"])
@pytest.mark.parametrize("make", [Counted, Timed, Summing])
def test_a_fusion_builds_one_instance_of_each_kind(make: Callable[[], nn.Module], solver: str) -> None:
    sources = [SourceModel(str(number), make, state) for number, state in enumerate(states(make))]
    result = fuse(sources, example_inputs=INPUTS, solver=solver)
    assert result.check is not None
    assert result.check.is_telling
    assert result.check.error < 1e-5
    assert counts() == MOST


def test_where_the_constructor_needs_real_tensors_one_instance_serves_all() -> None:
    result = fuse([SourceModel("s", Refusing, state) for state in states(Refusing)], example_inputs=INPUTS)
    assert result.check is not None
    assert result.check.is_telling
    # The one without memory is refused as soon as a value is asked for.
    assert counts() == MOST


@pytest.mark.parametrize("make", [Timed, Summing, Refusing])
def test_a_model_of_the_result_has_what_no_file_holds(make: Callable[[], nn.Module]) -> None:
    result = fuse([SourceModel("s", make, state) for state in states(make)], example_inputs=INPUTS)
    expected = make().eval()
    expected.load_state_dict(dict(result.state))
    assert torch.equal(result.model()(INPUTS), expected(INPUTS))


def test_fresh_instances_are_fresh() -> None:
    architecture = KnownArchitecture(Refusing)
    assert not architecture.is_lazy
    first, second = architecture(), architecture()
    assert first is not second
    assert architecture.outline is not first
    assert architecture.initial_state().keys() == first.state_dict().keys()


def test_a_function_that_builds_something_else_later_is_asked_again() -> None:
    width = 4
    make = lambda: nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 3))  # noqa: E731
    for width in (4, 5):
        result = fuse([SourceModel("s", make, make().state_dict())] * 2, example_inputs=INPUTS)
        assert result.state["0.weight"].shape == (width, 6)


def test_a_state_that_does_not_fit_is_told_as_before() -> None:
    state = {**Counted().state_dict(), "first.weight": torch.zeros(8, 5)}
    with pytest.raises(ArchitectureError, match=r"'first\.weight' has shape \(8, 5\), the architecture has \(8, 6\)"):
        fuse([SourceModel("s", Counted, state)] * 2, example_inputs=INPUTS)


@pytest.mark.parametrize("solver", ["wb", "average"])
def test_the_job_builds_no_more(tmp_path: Path, solver: str) -> None:
    paths = []
    for number, state in enumerate(states(Counted)):
        paths.append(str(tmp_path / f"{number}.safetensors"))
        save_checkpoint(state, paths[-1])
    code = tmp_path / "counted_net.py"
    code.write_text(f"import sys\n\nmake = sys.modules[{__name__!r}].Counted\n")
    recipe = FusionRecipe(
        models=paths, arch=[f"{code}:make"], input_shape=(6,), output=str(tmp_path / "fused.safetensors"), solver=solver
    )
    run_fuse(recipe, default_manager(), lambda _: None)
    # The shape of the input is tried on a real one: so small a network runs before torch has imported what runs one
    # without memory.
    assert counts() == {"without memory": 1, "real": 1 if solver == "average" else 2}
