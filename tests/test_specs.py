"""SPEC strings: architectures and data, and the errors for what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mergekit_ot.errors import ArchitectureError, DataError
from mergekit_ot.sources.datasets import TRAIN, resolve_data
from mergekit_ot.sources.specs import parse_spec, parse_value, resolve_architecture

_CODE = """
import torch
from torch import nn

def mlp(h1=4, h2=3, bias=True):
    return nn.Sequential(nn.Linear(2, h1, bias=bias), nn.ReLU(), nn.Linear(h1, h2, bias=bias))

def not_a_module():
    return 3

def fails():
    raise RuntimeError("no weather today")

prototype = nn.Linear(2, 2)

def batches(split, size=2):
    return [(torch.zeros(size, 2), torch.full((size,), 0 if split == "train" else 1))]

def once():
    return iter([(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long))])

def triples():
    return [(torch.zeros(2), torch.ones(2), torch.zeros(2))]

def empty():
    return []

listed = [(torch.zeros(3, 2), torch.zeros(3, dtype=torch.long))]
"""


@pytest.fixture
def nets(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(_CODE)
    return str(tmp_path / "nets.py")


@given(st.dictionaries(st.from_regex(r"[a-z]{1,6}", fullmatch=True), st.integers() | st.booleans(), max_size=4))
def test_query_returns_what_was_written(arguments: dict[str, object]) -> None:
    query = "&".join(f"{key}={value}" for key, value in arguments.items())
    assert parse_spec(f"nets.py:mlp?{query}").arguments == arguments


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("-0.5", -0.5),
        ("1e-3", 1e-3),
        ("True", True),
        ("none", None),
        ("relu", "relu"),
        ("1,0.2", (1, 0.2)),
        ("a,b", "a,b"),
        ("", ""),
    ],
)
def test_values(text: str, value: object) -> None:
    assert parse_value(text) == value


@pytest.mark.parametrize("text", ["nets.py:mlp", "a/b.py:mlp", "package.module:mlp", "C:\\nets.py:mlp"])
def test_place_and_name(text: str) -> None:
    parsed = parse_spec(text)
    assert (parsed.place, parsed.name) == (text.rpartition(":")[0], "mlp")


def test_architecture_builds_fresh_instances_with_its_arguments(nets: str) -> None:
    make = resolve_architecture(f"{nets}:mlp?h1=7&bias=false")
    one, other = make(), make()
    assert isinstance(one, nn.Sequential)
    assert isinstance(other, nn.Sequential)
    assert one[0].weight.shape == (7, 2)
    assert one[0].bias is None
    assert one is not other
    assert one[0].weight is not other[0].weight
    assert make.arguments == {"h1": 7, "bias": False}
    assert not make.is_registered


def test_an_instance_serves_as_prototype(nets: str) -> None:
    make = resolve_architecture(f"{nets}:prototype")
    assert make() is not make()
    assert isinstance(make(), nn.Linear)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":mpl", "no 'mpl'.*Did you mean '.*:mlp'.*mlp"),
        ("", "names a file but nothing in it.*mlp"),
        (":mlp?h3=4", "h3.*It takes: h1=4, h2=3, bias=True"),
        (":not_a_module", "returned a int, not a torch.nn.Module"),
        (":fails", r"raised RuntimeError: no weather today \(nets.py, line \d+\)"),
        (":listed", "is a list, not a callable"),
    ],
)
def test_architecture_errors(nets: str, name: str, message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        resolve_architecture(nets + name)()


def test_architecture_places_that_do_not_exist(nets: str, tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match=r"no file .*net.py'. Did you mean .*nets.py"):
        resolve_architecture(str(tmp_path / "net.py:mlp"))
    with pytest.raises(ArchitectureError, match=r"no module 'no_such_package.nets'"):
        resolve_architecture("no_such_package.nets:mlp")
    with pytest.raises(ArchitectureError, match=r"Unknown architecture 'no-such-net'.*A SPEC is"):
        resolve_architecture("no-such-net")
    (tmp_path / "broken.py").write_text("import no_such_package\n")
    with pytest.raises(ArchitectureError, match=r"raised ModuleNotFoundError"):
        resolve_architecture(str(tmp_path / "broken.py:mlp"))


def _archive(folder: Path, **arrays: np.ndarray) -> str:
    path = folder / "data.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return str(path)


def _images(count: int, value: int = 255) -> np.ndarray:
    return np.full((count, 4, 4), value, dtype=np.uint8)


def test_archive_of_bytes_becomes_normalised_images(tmp_path: Path) -> None:
    path = _archive(tmp_path, x_test=_images(5), y_test=np.arange(5, dtype=np.uint8))
    batches = list(resolve_data(f"{path}?mean=0.5&std=0.25&batch=2&limit=3")())
    assert [tuple(x.shape) for x, _ in batches] == [(2, 1, 4, 4), (1, 1, 4, 4)]
    assert torch.equal(batches[0][0], torch.full((2, 1, 4, 4), 2.0))
    assert torch.equal(torch.cat([y for _, y in batches]), torch.arange(3))
    assert batches[0][1].dtype == torch.int64


def test_test_part_for_evaluation_and_train_part_for_calibration(tmp_path: Path) -> None:
    path = _archive(tmp_path, x_train=_images(6, 0), y_train=np.arange(6), x_test=_images(2), y_test=np.arange(2))
    assert next(iter(resolve_data(path)()))[0].mean() == 1
    train = next(iter(resolve_data(path, split=TRAIN)()))
    assert train[0].mean() == 0
    assert sorted(train[1].tolist()) == list(range(6))
    assert next(iter(resolve_data(f"{path}?split=train")()))[0].shape[0] == 6
    again = resolve_data(path, split=TRAIN)
    assert torch.equal(next(iter(again()))[1], train[1])
    assert torch.equal(next(iter(again()))[1], train[1])


def test_train_part_is_shuffled_pair_by_pair(tmp_path: Path) -> None:
    x = np.arange(50, dtype=np.float32)[:, None]
    inputs, targets = next(iter(resolve_data(_archive(tmp_path, x_train=x, y_train=np.arange(50)), split=TRAIN)()))
    assert torch.equal(inputs[:, 0].long(), targets)
    assert targets.tolist() != list(range(50))


@pytest.mark.parametrize(
    "names",
    [("x", "y"), ("inputs", "targets"), ("images", "labels"), ("arr_0", "arr_1"), ("test_images", "test_labels")],
)
def test_names_of_arrays(tmp_path: Path, names: tuple[str, str]) -> None:
    path = _archive(tmp_path, **{names[0]: _images(2), names[1]: np.array([1, 0])})
    assert next(iter(resolve_data(path)()))[1].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("array", "query", "shape"),
    [
        (np.zeros((2, 5, 6, 3), np.uint8), "", (3, 5, 6)),
        (np.zeros((2, 3, 5, 6), np.float32), "", (3, 5, 6)),
        (np.zeros((2, 5, 6), np.float64), "", (1, 5, 6)),
        (np.zeros((2, 5, 6), np.float32), "?layout=raw", (5, 6)),
        (np.zeros((2, 5), np.float32), "", (5,)),
        (np.zeros((2, 5), np.int64), "", (5,)),
        (np.zeros((2, 5, 6, 3), np.uint8), "?mean=0.1,0.2,0.3&std=1,2,4", (3, 5, 6)),
    ],
)
def test_layout_of_inputs(tmp_path: Path, array: np.ndarray, query: str, shape: tuple[int, ...]) -> None:
    inputs, _ = next(iter(resolve_data(_archive(tmp_path, x=array, y=np.array([0, 1])) + query)()))
    assert tuple(inputs.shape[1:]) == shape
    assert inputs.dtype == (torch.int64 if array.dtype == np.int64 else torch.float32)
    if "mean=0.1," in query:
        assert torch.allclose(inputs[0, :, 0, 0], torch.tensor([-0.1, -0.1, -0.075]))


def test_float_targets_stay_numbers(tmp_path: Path) -> None:
    path = _archive(tmp_path, x=np.zeros((2, 3), np.float32), y=np.array([[0.5], [1.5]]))
    assert next(iter(resolve_data(path)()))[1].tolist() == [[0.5], [1.5]]


@pytest.mark.parametrize(
    ("arrays", "query", "message"),
    [
        ({"a": np.zeros(2)}, "", "no test part: it holds a. Expected x_train"),
        ({"x_train": np.zeros((2, 1)), "y_train": np.zeros(2)}, "", r"no test part.*Add \?split=train"),
        ({"x": np.zeros((3, 1)), "y": np.zeros(2)}, "", r"does not pair up: x has shape \(3, 1\)"),
        ({"x": np.zeros((2, 1)), "y": np.zeros(2)}, "?batches=3", "'batches' .*not known.*split, mean"),
        ({"x": np.zeros((2, 1)), "y": np.zeros(2)}, "?split=valid", "split=valid"),
        ({"x": np.zeros((2, 1)), "y": np.zeros(2)}, "?batch=0", "batch=0"),
        ({"x": np.zeros((2, 1)), "y": np.zeros(2)}, "?std=0", "cannot be zero"),
        ({"x": np.zeros((2, 3, 4, 4)), "y": np.zeros(2)}, "?mean=1,2", r"does not fit inputs of shape \(3, 4, 4\)"),
        ({"x": np.array([{}, {}]), "y": np.zeros(2)}, "", "plain arrays"),
    ],
)
def test_archive_errors(tmp_path: Path, arrays: dict[str, np.ndarray], query: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(resolve_data(_archive(tmp_path, **arrays) + query)())


def test_callable_gets_the_split_unless_the_query_says(nets: str) -> None:
    assert next(iter(resolve_data(f"{nets}:batches")()))[1].tolist() == [1, 1]
    assert next(iter(resolve_data(f"{nets}:batches", split=TRAIN)()))[1].tolist() == [0, 0]
    assert next(iter(resolve_data(f"{nets}:batches?split=train&size=3")()))[1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("name", ["once", "listed"])
def test_data_can_be_read_twice(nets: str, name: str) -> None:
    data = resolve_data(f"{nets}:{name}")
    assert len(list(data())) == len(list(data())) == len(list(data)) == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "has no batches"),
        ("fails", "raised RuntimeError: no weather today"),
        ("not_a_module", "returned a int"),
        ("batchez", "Did you mean '.*:batches'"),
    ],
)
def test_data_errors(nets: str, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(resolve_data(f"{nets}:{name}")())


def test_of_a_triple_the_first_are_inputs_and_the_second_targets(nets: str) -> None:
    ((inputs, targets),) = resolve_data(f"{nets}:triples")()
    assert inputs.tolist() == [0, 0]
    assert targets is not None
    assert targets.tolist() == [1, 1]


def test_missing_archive_and_unknown_name(tmp_path: Path) -> None:
    _archive(tmp_path, x=np.zeros(2), y=np.zeros(2))
    with pytest.raises(DataError, match=r"Did you mean .*data.npz"):
        resolve_data(str(tmp_path / "dat.npz"))
    with pytest.raises(DataError, match=r"Unknown data set 'no-such-data'"):
        resolve_data("no-such-data")
