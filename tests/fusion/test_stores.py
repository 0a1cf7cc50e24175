"""Where tensors come from and where the fused ones go does not matter: the same bytes, each looked at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import shards
import torch
from nets import Cnn, Mlp
from shards import ShardStore, ShardWriter, write_shards
from signed import traced_once
from torch import Tensor, nn

from mergekit_ot import (
    CheckpointError,
    FusionInputs,
    FusionOptions,
    MemoryStore,
    PluginManager,
    SourceModel,
    fuse,
    load_checkpoint,
    save_checkpoint,
    trace_model,
)
from mergekit_ot.fusion.engine import run_fusion
from mergekit_ot.fusion.setup import FusionSetup
from mergekit_ot.hooks.manager import default_manager
from mergekit_ot.hooks.preparing import prepare
from mergekit_ot.jobs.fusing import run_fuse
from mergekit_ot.recipe import FusionRecipe
from mergekit_ot.storage import finite
from mergekit_ot.storage.finite import FiniteStore
from mergekit_ot.testing import check_store

pytestmark = pytest.mark.usefixtures(traced_once.__name__)

IMAGES = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))
SOLVERS = ("wb", "weight-matching")


class Tied(nn.Module):
    """A tensor under two names."""

    def __init__(self) -> None:
        super().__init__()
        # The tied layers have the order of the inputs; only what the last ones share is free.
        self.first, self.again = nn.Linear(5, 5), nn.Linear(5, 5)
        self.free, self.last = nn.Linear(5, 4), nn.Linear(4, 2)
        self.again.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.free(torch.relu(self.again(torch.relu(self.first(x)))))))


def states(make: Callable[[], nn.Module] = Cnn) -> list[dict[str, Tensor]]:
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        made.append(make().state_dict())
    return made


def in_files(kind: str, folder: Path, make: Callable[[], nn.Module] = Cnn) -> list[SourceModel]:
    sources = []
    for number, state in enumerate(states(make)):
        name = f"{number}"
        if kind == "shards":
            store: Mapping[str, Tensor] = write_shards(state, folder / name)
        elif kind == "legacy":
            torch.save(state, folder / f"{name}.pt", _use_new_zipfile_serialization=False)
            store = load_checkpoint(folder / f"{name}.pt").state
        else:
            store = load_checkpoint(save_checkpoint(state, folder / f"{name}{kind}")).state
        sources.append(SourceModel(name, make, store))
    return sources


def in_memory(make: Callable[[], nn.Module] = Cnn) -> list[SourceModel]:
    return [SourceModel(str(number), make, state) for number, state in enumerate(states(make))]


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert list(one) == list(other)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def setup_of(sources: list[SourceModel], solver: str = "wb", inputs: Tensor = IMAGES, **options: Any) -> FusionSetup:
    manager = options.pop("manager", default_manager())
    given = FusionInputs(sources, options.pop("target", 0), inputs, options.pop("data", None))
    chosen = FusionOptions(**{"solver": solver, "calibration_size": 100, "device": "cpu", **options})
    return prepare(given, chosen, manager, trace_model)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("kind", [".pt", "legacy", ".safetensors", "shards"])
def test_the_same_bytes_from_every_store(kind: str, solver: str, tmp_path: Path) -> None:
    options = {"solver": solver, "example_inputs": IMAGES, "device": "cpu"}
    assert_same(fuse(in_files(kind, tmp_path), **options).state, fuse(in_memory(), **options).state)


def test_a_plain_mapping_becomes_a_store() -> None:
    state = states()[0]
    source = SourceModel("net", Cnn, state)
    check_store(source.state)
    assert source.state["fc1.weight"] is state["fc1.weight"]
    assert SourceModel("bare", Cnn).state.names == {}.keys()


def test_nothing_is_read_before_the_fusion_runs(tmp_path: Path) -> None:
    sources = in_files("shards", tmp_path)
    setup = setup_of(sources)
    stores = [source.state.store for source in sources]
    assert [store.reads for store in stores if isinstance(store, ShardStore)] == [[], []]
    run_fusion(setup)
    for store in stores:
        assert isinstance(store, ShardStore)
        assert set(store.reads) == set(Cnn().state_dict())


@pytest.mark.parametrize("kind", ["shards", ".safetensors", "memory"])
def test_every_tensor_is_looked_at_once(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: Counter[tuple[str, str]] = Counter()
    check = finite.check_finite

    def counted(state: Mapping[str, Tensor], owner: str, sentence: str) -> None:
        looked_at.update((owner, name) for name in state)
        check(state, owner, sentence)

    monkeypatch.setattr(finite, "check_finite", counted)
    sources = in_memory() if kind == "memory" else in_files(kind, tmp_path)
    fuse(sources, solver="weight-matching", example_inputs=IMAGES, device="cpu", refine=True)
    assert looked_at == {(source.name, name): 1 for source in sources for name in Cnn().state_dict()}


@pytest.mark.parametrize("broken", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [name for name, value in Cnn().state_dict().items() if value.is_floating_point()])
def test_nan_in_any_tensor_of_a_file_is_refused(name: str, broken: int, tmp_path: Path) -> None:
    changed = states()
    changed[broken][name].view(-1)[-1] = float("nan")
    sources = [
        SourceModel(str(number), Cnn, write_shards(state, tmp_path / str(number)))
        for number, state in enumerate(changed)
    ]
    writer = ShardWriter(tmp_path / "fused", size=100)
    for dry_run in (False, True):
        with pytest.raises(CheckpointError, match=rf"'{name}' of {broken} holds NaN"):
            run_fusion(setup_of(sources), dry_run=dry_run, writer=writer)
    assert list((tmp_path / "fused").iterdir()) == []


def test_a_tensor_that_is_not_finite_is_refused_at_every_read_of_it() -> None:
    store = FiniteStore(MemoryStore({"bad": torch.tensor([1.0, float("inf")]), "good": torch.ones(2)}), "a.pt")
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"'bad' of 'a\.pt' has 1 of 2"):
            store.read("bad")
    with pytest.raises(CheckpointError, match="has 1 of 1"):
        store.slice("bad", 1, 2)
    assert store.slice("bad", 0, 1).tolist() == [1.0]
    assert store.read("good").tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("make", "inputs"), [(Cnn, IMAGES), (Tied, torch.randn(2, 5))])
@pytest.mark.parametrize("options", [{}, {"repair": "rescale", "data": True}], ids=["bare", "repaired"])
def test_what_goes_to_a_writer_is_what_stays_in_memory(
    make: Callable[[], nn.Module], inputs: Tensor, options: dict[str, object], tmp_path: Path
) -> None:
    chosen = {**options, "data": [inputs]} if options else {}
    kept = run_fusion(setup_of(in_memory(make), inputs=inputs, **chosen)).state
    writer = ShardWriter(tmp_path / "fused")
    written = run_fusion(setup_of(in_files("shards", tmp_path, make), inputs=inputs, **chosen), writer=writer)
    assert isinstance(kept, dict)
    assert set(writer.reopened().names) == set(make().state_dict())
    assert_same(written.state, kept)
    assert writer.most_held <= 2
    written.model().load_state_dict(dict(writer.reopened()))


def test_a_folder_of_shards_is_a_format_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, state in enumerate(states(Mlp)):
        write_shards(state, Path(f"{number}.shards"))
        torch.save(state, f"{number}.pt")
    manager = PluginManager.load()
    manager.register(shards, "mergeot_shards")
    for suffix in ("pt", "shards"):
        recipe = FusionRecipe(
            models=[f"0.{suffix}", f"1.{suffix}"], output=f"fused-{suffix}.pt", arch=["nets:Mlp"], input_shape=(6,)
        )
        run_fuse(recipe, manager, lambda _: None)
    plain, sharded = (load_checkpoint(f"fused-{suffix}.pt") for suffix in ("pt", "shards"))
    assert_same(plain.state, sharded.state)
    digests = [source["sha256"] for source in sharded.provenance["sources"]]
    assert digests == [load_checkpoint(f"{number}.shards", manager).sha256 for number in (0, 1)]
    with pytest.raises(CheckpointError, match=r"0\.shards' is a folder, not a checkpoint\. It contains: index\.json"):
        load_checkpoint("0.shards")
