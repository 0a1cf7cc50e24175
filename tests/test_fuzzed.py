"""Mutations of valid files, recipes, SPECs and rules: whatever is wrong with them, the error is one of ours."""

from __future__ import annotations

import contextlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import mergeot_exported
import mergeot_safetensors
import numpy as np
import pytest
import torch
from hostile.headers import with_header
from hostile.torch_files import pickled, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from mergekit_ot import EinRule, MergeotError, RuleError, load_checkpoint, resolve_data
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.recipe import make_recipe
from mergekit_ot.sources.specs import parse_spec
from mergekit_ot.storage.finite import check_finite
from mergekit_ot.storage.record import carried_by

_MANAGER = PluginManager([mergeot_safetensors, mergeot_exported])
_STATE = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}
_OWN = {"format": "mergekit_ot", "version": 1, "architecture": "mlp", "arguments": {"sizes": [3, 2]}}
_FUZZED = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@st.composite
def _mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Draws a seed with a few bytes changed, cut out, doubled or put in."""
    content = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        count = draw(st.sampled_from([1, 1, 2, 8, 64]))
        match draw(st.sampled_from(["change", "cut", "double", "insert", "number"])):
            case "change":
                content[place : place + 1] = draw(st.binary(min_size=1, max_size=1))
            case "cut":
                del content[place : place + count]
            case "double":
                content[place:place] = content[place : place + count]
            case "insert":
                content[place:place] = draw(st.binary(max_size=9))
            case _:
                content[place : place + 4] = draw(
                    st.sampled_from([b"\xff" * 4, bytes(4), b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80"])
                )
    return bytes(content)


def _archived(arrays: dict[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def _pickle_of(content: object) -> bytes:
    with zipfile.ZipFile(io.BytesIO(saved(content))) as archive:
        return archive.read("archive/data.pkl")


def _read(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    checkpoint = load_checkpoint(path, _MANAGER)
    assert all(isinstance(checkpoint.state.shape(name), torch.Size) for name in checkpoint.state)
    check_finite(checkpoint.state, str(path))


def _program(table: bytes) -> bytes:
    """Returns an exported program with a table of its weights and nothing else that is read."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("net/byteorder", "little")
        archive.writestr("net/data/weights/model_weights_config.json", table)
        archive.writestr("net/data/weights/weight_0", _STATE["a.weight"].numpy().tobytes())
        archive.writestr("net/data/weights/weight_1", _STATE["a.bias"].numpy().tobytes())
    return stream.getvalue()


def _read_table(path: Path, content: bytes) -> None:
    _read(path, _program(content))


def _entry(place: str, sizes: list[int], strides: list[int]) -> dict[str, object]:
    described = {"dtype": 7, "layout": 7, "storage_offset": {"as_int": 0}}
    described |= {"sizes": [{"as_int": size} for size in sizes], "strides": [{"as_int": stride} for stride in strides]}
    return {"path_name": place, "is_param": True, "use_pickle": False, "tensor_meta": described}


def _read_header(path: Path, content: bytes) -> None:
    _read(path, with_header(content))


def _read_pickle(path: Path, content: bytes) -> None:
    _read(path, pickled(content))


def _read_data(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    list(resolve_data(str(path), _MANAGER))


def _read_array(path: Path, content: bytes) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", content)
        archive.writestr("y.npy", content)
    list(resolve_data(str(path), _MANAGER))


def _read_recipe(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    recipe = make_recipe(path)
    recipe.write(path)
    assert make_recipe(path) == recipe


def _read_spec(path: Path, content: bytes) -> None:
    parse_spec(content.decode("utf-8", "surrogateescape"))


def _read_query(path: Path, content: bytes) -> None:
    path.write_bytes(_PAIRS)
    list(resolve_data(f"{path}?{content.decode('utf-8', 'surrogateescape')}", _MANAGER))


def _read_metadata(path: Path, content: bytes) -> None:
    metadata = json.loads(content)
    if isinstance(metadata, dict):
        carried_by(path, metadata)


def _read_rule(path: Path, content: bytes) -> None:
    text = content.decode("utf-8", "replace")
    rule = EinRule(text, ("argument",) * (text.partition("->")[0].count(";") + 1))
    assert len(rule.operands) == len(rule.arguments)
    assert rule.outputs


_PAIRS = _archived({"x": np.ones((4, 2, 2), np.float32), "y": np.zeros(4, np.int64)})
_ARRAY = io.BytesIO()
np.save(_ARRAY, np.ones((4, 3)))
_HEADER = save(_STATE)[8 : 8 + int.from_bytes(save(_STATE)[:8], "little")]
_RECIPES = [
    b"models: [a.pt, b.pt]\nsolver: gwb\nsolver_options: {alpha: 1}\nmodel-weights: [0.5, 0.5]\ninput_shape: [1, 28]\n",
    b"models: &m [a, b]\narch: *m\nrefine: yes\nseed: 3\n? [1]\n: 2\n",
    b"models:\n- model: a\nmerge_method: linear\ndate: 2020-01-01\n",
]
_WEIGHTS = {"a.weight": _entry("weight_0", [2, 3], [3, 1]), "a.bias": _entry("weight_1", [2], [1])}
_TABLE = json.dumps({"config": _WEIGHTS}).encode()
_KINDS: dict[str, tuple[Callable[[Path, bytes], None], str, list[bytes]]] = {
    "torch": (_read, ".pt", [saved(_STATE), saved({**_OWN, "state_dict": _STATE}), saved({"model": _STATE, "n": 1})]),
    "legacy": (_read, ".pt", [saved(_STATE, True), saved({"state_dict": _STATE}, True)]),
    "pickle": (
        _read_pickle,
        ".pt",
        [_pickle_of(_STATE), _pickle_of({"n": np.ones(2), **_STATE}), _pickle_of({"s": {1}})],
    ),
    "safetensors": (_read, ".safetensors", [save(_STATE), save(_STATE, {"mergekit_ot": json.dumps(_OWN)})]),
    "header": (_read_header, ".safetensors", [_HEADER]),
    "program": (_read, ".pt2", [_program(_TABLE)]),
    "table": (_read_table, ".pt2", [_TABLE]),
    "npz": (_read_data, ".npz", [_PAIRS]),
    "array": (_read_array, ".npz", [_ARRAY.getvalue()]),
    "recipe": (_read_recipe, ".yaml", _RECIPES),
    "spec": (_read_spec, "", [b"nets.py:mlp?hidden=64&bias=false", b"torch.nn:Linear?in_features=3&x=1,2.5"]),
    "query": (_read_query, ".npz", [b"mean=0.13&std=0.3&batch=2", b"split=train&limit=3&layout=raw"]),
    "metadata": (_read_metadata, "", [json.dumps({**_OWN, "input_shape": [3], "provenance": {"a": [1]}}).encode()]),
    "rule": (_read_rule, "", [b"... i; o i; o -> ... o", b"(g o) i *!; ~x -> x H!", b"n *~ -> n *~"]),
}


@pytest.mark.parametrize("kind", _KINDS)
def test_a_mutation_is_read_or_refused(kind, tmp_path):
    read, end, seeds = _KINDS[kind]

    @_FUZZED
    @given(_mutated(seeds))
    def mutations(content: bytes) -> None:
        expected = (
            (MergeotError, RuleError, json.JSONDecodeError, UnicodeDecodeError)
            if kind == "metadata"
            else (MergeotError, RuleError)
        )
        with contextlib.suppress(*expected):
            read(tmp_path / f"fuzzed{end}", content)

    mutations()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("... i; o i", "one '->'"),
        ("", "one '->'"),
        ("a -> b -> c", "one '->'"),
        ("a ?? -> a", r"'\?\?' is no axis"),
        ("a (b -> a", r"'\(b' is no axis"),
        ("() -> a", r"'\(\)' is no axis"),
        ("* ... -> *", "two places"),
        ("a; b -> a", "2 operands, and 1 arguments"),
    ],
)
def test_a_line_that_is_no_rule_is_refused(pattern, message):
    with pytest.raises(RuleError, match=message):
        EinRule(pattern)


_DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64)


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_are_those_that_torch_reads(legacy, tmp_path):
    whole = torch.arange(24.0).reshape(4, 6)
    state = {f"{dtype}"[6:]: torch.arange(5).to(dtype) for dtype in _DTYPES}
    state |= {"rows": whole[1:3], "turned": whole.t(), "steps": whole[::2, 1::2], "repeated": torch.ones(1).expand(9)}
    state |= {"scalar": torch.tensor(2.5), "none": torch.zeros(0, 3), "weight": torch.nn.Parameter(torch.ones(2))}
    state |= {"turned round": torch.tensor([1 + 2j]).conj(), "tied": whole}
    torch.save(state, tmp_path / "net.pt", _use_new_zipfile_serialization=not legacy)
    read = load_checkpoint(tmp_path / "net.pt", _MANAGER).state
    assert list(read) == list(state)
    for name, tensor in state.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


def test_the_program_to_be_mutated_is_read(tmp_path):
    (tmp_path / "net.pt2").write_bytes(_program(_TABLE))
    read = load_checkpoint(tmp_path / "net.pt2", _MANAGER).state
    assert all(torch.equal(read[name], tensor) for name, tensor in _STATE.items())
