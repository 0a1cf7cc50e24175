"""`check_store` and `check_writer` pass our stores and writers, and each clause fails one that breaks that clause."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from pathlib import Path

import pytest
import torch
from mergeot_safetensors.files import SafetensorsStore, SafetensorsWriter
from nets import Cnn
from shards import ShardStore, ShardWriter, write_shards
from torch import Tensor

from mergekit_ot import MemoryStore, StoreWriter, TensorStore, load_checkpoint, save_checkpoint
from mergekit_ot.errors import PluginError
from mergekit_ot.storage.finite import FiniteStore
from mergekit_ot.storage.fitting import FittedStore
from mergekit_ot.storage.store import MemoryWriter
from mergekit_ot.storage.torch_format import TorchStore, TorchWriter
from mergekit_ot.testing import check_store, check_writer


def state() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {**Cnn().state_dict(), "half": torch.randn(3, 2).to(torch.bfloat16)}


def legacy(path: Path) -> TensorStore:
    torch.save(state(), path, _use_new_zipfile_serialization=False)
    return load_checkpoint(path).state


STORES: dict[str, Callable[[Path], TensorStore]] = {
    "memory": lambda folder: MemoryStore(state()),
    "torch": lambda folder: load_checkpoint(save_checkpoint(state(), folder / "a.pt")).state,
    "legacy": lambda folder: legacy(folder / "a.pt"),
    "safetensors": lambda folder: load_checkpoint(save_checkpoint(state(), folder / "a.safetensors")).state,
    "shards": lambda folder: write_shards(state(), folder / "a"),
    "finite": lambda folder: FiniteStore(MemoryStore(state()), "a"),
    "fitted": lambda folder: FittedStore(MemoryStore(state()), {**state(), "num_batches_tracked": torch.tensor(0)}),
}
KINDS = {
    "memory": MemoryStore,
    "torch": TorchStore,
    "legacy": TorchStore,
    "safetensors": SafetensorsStore,
    "shards": ShardStore,
    "finite": FiniteStore,
    "fitted": FittedStore,
}


@pytest.mark.parametrize("name", STORES)
def test_our_stores_keep_the_contract(name: str, tmp_path: Path) -> None:
    store = STORES[name](tmp_path)
    assert isinstance(store, KINDS[name])
    check_store(store)
    assert set(store.names) >= set(state())


WRITERS: dict[str, Callable[[Path], StoreWriter]] = {
    "memory": lambda place: MemoryWriter(),
    "torch": lambda place: TorchWriter(place, {"format": "mergekit_ot", "version": 1}),
    "safetensors": lambda place: SafetensorsWriter(place, {}),
    "shards": ShardWriter,
}


@pytest.mark.parametrize("name", WRITERS)
def test_our_writers_keep_the_contract(name: str, tmp_path: Path) -> None:
    count = itertools.count()
    check_writer(lambda: WRITERS[name](tmp_path / str(next(count))))


def test_a_store_without_tensors_is_no_proof() -> None:
    with pytest.raises(PluginError, match="shows nothing"):
        check_store(MemoryStore({}))


class Copied(TensorStore):
    """The least that satisfies the contract."""

    def __init__(self) -> None:
        self.tensors = {"weight": torch.arange(6.0).reshape(3, 2), "steps": torch.tensor(5)}

    @property
    def names(self) -> Collection[str]:
        return self.tensors.keys()

    def shape(self, name: str) -> torch.Size:
        return self.tensors[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, name: str) -> Tensor:
        return self.tensors[name].clone()

    def slice(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start:stop]

    def digest(self) -> str:
        return 64 * "0"

    def close(self) -> None:
        self.tensors = {}


class NamesTwice(Copied):
    @property
    def names(self) -> Collection[str]:
        return [*self.tensors, *self.tensors]


class GivesNone(Copied):
    def read(self, name: str) -> Tensor:
        return self.tensors.get(name, torch.zeros(()))


class OtherShape(Copied):
    def shape(self, name: str) -> torch.Size:
        return torch.Size([*self.tensors[name].shape, 1])


class OtherType(Copied):
    def dtype(self, name: str) -> torch.dtype:
        self.tensors[name]
        return torch.float64


class Drifts(Copied):
    def read(self, name: str) -> Tensor:
        self.tensors[name] = self.tensors[name] + 1
        return self.tensors[name]


class OneTooMany(Copied):
    def slice(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name][start : stop + 1]


class CutsScalars(Copied):
    def slice(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name].reshape(-1)[start:stop] if name == "steps" else self.tensors[name][start:stop]


class Length(Copied):
    def digest(self) -> str:
        return "6"


class Random(Copied):
    def digest(self) -> str:
        return f"{int(torch.randint(10**9, ())):064x}"


class HoldsAFile(Copied):
    def __init__(self) -> None:
        super().__init__()
        self.read_by = lambda: None


class ComesBackEmpty(Copied):
    def __reduce__(self) -> tuple[type[Copied], tuple[()], dict[str, object]]:
        return type(self), (), {"tensors": {}}


class ComesBackOther(Copied):
    def __reduce__(self) -> tuple[type[Copied], tuple[()], dict[str, object]]:
        return type(self), (), {"tensors": {name: tensor * 0 for name, tensor in self.tensors.items()}}


class StaysOpen(Copied):
    def close(self) -> None:
        pass


class ClosesAll(Copied):
    shared: dict[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        type(self).shared = self.tensors

    def close(self) -> None:
        type(self).shared.clear()
        self.tensors = {}


def test_the_least_store_keeps_the_contract() -> None:
    check_store(Copied())


@pytest.mark.parametrize(
    ("kind", "clause"),
    [
        (NamesTwice, "each once"),
        (GivesNone, "is a KeyError"),
        (OtherShape, "the shape of 'weight'"),
        (OtherType, "the type of 'weight'"),
        (Drifts, "second read"),
        (OneTooMany, "part of the whole"),
        (CutsScalars, "the scalar 'steps' was cut"),
        (Length, "SHA-256"),
        (Random, "changed between two questions"),
        (HoldsAFile, "can be pickled"),
        (ComesBackEmpty, "can be pickled"),
        (ComesBackOther, "'weight' differs"),
        (StaysOpen, "2 tensors are left"),
        (ClosesAll, "was closed with it"),
    ],
)
def test_each_clause_fails_a_store_that_breaks_it(kind: type[Copied], clause: str) -> None:
    with pytest.raises(PluginError, match=clause) as raised:
        check_store(kind())
    assert kind.__name__ in str(raised.value)


class Keeps(StoreWriter):
    """The least that satisfies the contract."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}

    def write(self, name: str, tensor: Tensor) -> None:
        self.state[name] = tensor.clone()

    def close(self) -> None:
        pass

    def reopened(self) -> TensorStore:
        return MemoryStore(self.state)


class Narrows(Keeps):
    def write(self, name: str, tensor: Tensor) -> None:
        self.state[name] = tensor.float() if tensor.dtype is torch.float64 else tensor


class Forgets(Keeps):
    def write(self, name: str, tensor: Tensor) -> None:
        if name != "tied":
            self.state[name] = tensor


class WritesInto(Keeps):
    def write(self, name: str, tensor: Tensor) -> None:
        self.state[name] = tensor.clone()
        tensor.zero_()


class ClosesTwice(Keeps):
    closed = 0

    def close(self) -> None:
        self.closed += 1
        if self.closed > 1:
            self.state = {name: tensor * 0 for name, tensor in self.state.items()}


class Unpicklable(Keeps):
    def reopened(self) -> TensorStore:
        store = HoldsAFile()
        store.tensors = self.state
        return store


@pytest.mark.parametrize(
    ("kind", "clause"),
    [
        (Narrows, "'double' differs"),
        (Forgets, "written were"),
        (WritesInto, "is not changed"),
        (ClosesTwice, "Closing a writer again"),
        (Unpicklable, "contract of a store"),
    ],
)
def test_each_clause_fails_a_writer_that_breaks_it(kind: Callable[[], StoreWriter], clause: str) -> None:
    with pytest.raises(PluginError, match=clause):
        check_writer(kind)


def test_the_least_writer_keeps_the_contract() -> None:
    check_writer(Keeps)
