"""Files that look like safetensors: their headers claim what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from hostile.case import Case, checkpoint, linear, raw

_GOOD: dict[str, Any] = {
    "weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "bias": {"dtype": "F32", "shape": [2], "data_offsets": [24, 32]},
}


def with_header(header: bytes, data: bytes = bytes(32)) -> bytes:
    """Returns a file with a header of one's own."""
    return len(header).to_bytes(8, "little") + header + data


def _case(name: str, header: bytes, *says: str) -> Case:
    return checkpoint(name, raw(with_header(header)), *says, end=".safetensors")


def _weight(name: str, change: dict[str, Any], *says: str) -> Case:
    table = {**_GOOD, "weight": {**_GOOD["weight"], **change}}
    return _case(f"safetensors: {name}", json.dumps(table).encode(), "'weight'", *says)


def _metadata(path: Path) -> None:
    path.write_bytes(save(linear(), {"mergekit_ot": "[" * 100_000}))


_WHOLE = save(linear())
_ENTRY = json.dumps(_GOOD["weight"])
HEADERS: list[Case] = [
    checkpoint("safetensors: seven bytes", raw(b"1234567"), "truncated", end=".safetensors"),
    checkpoint("safetensors: without its last bytes", raw(_WHOLE[:-5]), "truncated", "'", end=".safetensors"),
    checkpoint("safetensors: header beyond the file", raw(b"\xff" * 7 + b"\x00{}"), "truncated", end=".safetensors"),
    _case("safetensors: header of 17 MiB", b" " * (17 << 20), "MERGEOT_MAX_HEADER_BYTES"),
    _case("safetensors: header is no JSON", b"{'weight': 1}", "header"),
    _case("safetensors: header is no UTF-8", b'{"\xff": 1}', "header"),
    _case("safetensors: header is a list", b'[{"weight": 1}]', "header"),
    _case("safetensors: header nested deeply", b'{"weight":' + b"[" * 100_000, "header", "nested"),
    _case("safetensors: number of 5,000 digits", b'{"weight":' + b"9" * 5000 + b"}", "header", "digits"),
    _case("safetensors: one name twice", f'{{"weight": {_ENTRY}, "weight": {_ENTRY}}}'.encode(), "'weight'", "twice"),
    _case("safetensors: no tensors", b'{"__metadata__": {}}', "without tensors"),
    _case("safetensors: metadata is a list", b'{"__metadata__": [1]}', "__metadata__"),
    _case("safetensors: metadata holds numbers", b'{"__metadata__": {"a": 1}}', "__metadata__"),
    _case("safetensors: entry is a number", b'{"weight": 5}', "'weight'"),
    _case("safetensors: name of a megabyte", json.dumps({"w" * 1_000_000: 1}).encode(), "MERGEOT_MAX_NAME_LENGTH"),
    _weight("unknown type", {"dtype": "F7"}, "F7"),
    _weight("type is a list", {"dtype": ["F32"]}),
    _weight("float8", {"dtype": "F8_E4M3", "shape": [24]}, "F8_E4M3"),
    _weight("negative size", {"shape": [-2, -3]}, "whole numbers"),
    _weight("size true", {"shape": [True, 6]}, "whole numbers"),
    _weight("shape is a text", {"shape": "23"}, "whole numbers"),
    _weight("huge shape", {"shape": [2**40, 2**40]}),
    _weight("huge shape of nothing", {"shape": [0, 2**70], "data_offsets": [0, 0]}, "too large"),
    _weight("offsets beyond the end", {"data_offsets": [0, 2**50]}, "truncated"),
    _weight("offsets in the wrong order", {"data_offsets": [24, 0]}),
    _weight("three offsets", {"data_offsets": [0, 24, 24]}),
    _weight("offsets over another tensor", {"data_offsets": [8, 32]}, "'bias'", "over each other"),
    checkpoint("safetensors: own metadata nested deeply", _metadata, "'mergekit_ot'", "nested", end=".safetensors"),
    checkpoint(
        "safetensors: whole numbers as weights",
        raw(save({name: value.long() for name, value in linear().items()})),
        "'weight'",
        "int64",
        end=".safetensors",
    ),
    checkpoint(
        "safetensors: not a number",
        raw(save({**linear(), "bias": torch.full((2,), torch.nan)})),
        "'bias'",
        "2 of 2",
        end=".safetensors",
    ),
]
