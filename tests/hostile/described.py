"""Checkpoints in our own format whose metadata are not what they should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hostile.case import Case, checkpoint

_STATE = {"fc1.weight": torch.ones(2, 3), "fc1.bias": torch.ones(2)}
_GOOD: dict[str, Any] = {
    "format": "mergekit_ot",
    "version": 1,
    "architecture": "mlp",
    "arguments": {"sizes": [3, 2]},
    "input_shape": [3],
    "provenance": {},
}


def _torch_case(name: str, key: str, value: object, *says: str) -> Case:
    def make(path: Path) -> None:
        torch.save({**_GOOD, "state_dict": _STATE, key: value}, path)

    return checkpoint(f"{name} in .pt", make, *says, arch=False)


def _safetensors_case(name: str, key: str, value: object, *says: str) -> Case:
    def make(path: Path) -> None:
        save_file(_STATE, path, metadata={"mergekit_ot": json.dumps({**_GOOD, key: value})})

    return checkpoint(f"{name} in .safetensors", make, *says, end=".safetensors", arch=False)


_BOTH: list[tuple[str, str, object, tuple[str, ...]]] = [
    ("version is a text", "version", "9", ("'version'", "integer")),
    ("version is a list", "version", [1], ("'version'",)),
    ("version is true", "version", True, ("'version'",)),
    ("version is zero", "version", 0, ("'version'",)),
    ("version is newer", "version", 2, ("newer version",)),
    ("arguments are a list", "arguments", [1], ("'arguments'",)),
    ("arguments without end", "arguments", {"sizes": [3, 10**6, 2**62]}, ("mlp", "overflow")),
    ("argument of 5,000 digits", "arguments", {"sizes": ["9" * 5000, 2]}, ("mlp", "digits")),
    ("arguments that nobody takes", "arguments", {"depth": 3}, ("mlp", "depth")),
    ("provenance is a text", "provenance", "x", ("'provenance'",)),
    ("architecture is a list", "architecture", ["mlp"], ("'architecture'",)),
    ("architecture names code", "architecture", "os:system", ("os:system", "no installed plugin")),
    ("architecture names a file", "architecture", "evil.py:net", ("evil.py:net", "no installed plugin")),
    ("architecture of a megabyte", "architecture", "a" * 1_000_000, ("'architecture'", "MERGEOT_MAX_NAME_LENGTH")),
    ("input shape is a number", "input_shape", 5, ("'input_shape'",)),
    ("input shape holds a text", "input_shape", ["a"], ("'input_shape.0'",)),
    ("input shape is negative", "input_shape", [-8], ("'input_shape.0'",)),
    ("input shape holds a list", "input_shape", [[8]], ("'input_shape.0'",)),
    ("input shape is huge", "input_shape", [2**40], ("'input_shape'", "MERGEOT_MAX_INPUT_NUMBERS")),
    ("input shape is empty", "input_shape", [], ("'input_shape'", "at least 1")),
]
DESCRIBED: list[Case] = [
    *(_torch_case(name, key, value, *says) for name, key, value, says in _BOTH),
    *(_safetensors_case(name, key, value, *says) for name, key, value, says in _BOTH),
    _torch_case("state is a list", "state_dict", [1, 2], "'state_dict'"),
    _torch_case("state is a text", "state_dict", "ab", "'state_dict'"),
    _torch_case("state is nothing", "state_dict", None, "'state_dict'"),
    _torch_case("state holds a number", "state_dict", {"fc1.weight": 5}, "'state_dict.fc1.weight'", "int"),
    _torch_case("state holds a meta tensor", "state_dict", {"w": torch.empty(2, device="meta")}, "'w'", "meta"),
    _torch_case("state has a number as name", "state_dict", {7: torch.ones(2)}, "int 7"),
]
