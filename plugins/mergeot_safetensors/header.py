"""The header of a safetensors file: a table of tensors as JSON, checked before a tensor is read."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import torch

from mergekit_ot import Limit, MappedFile, check_tensor_name
from mergekit_ot.errors import CheckpointError

LENGTH_BYTES = 8
_TEXTS = "__metadata__"
_LIMIT = Limit("MERGEOT_MAX_HEADER_BYTES", 16 << 20)
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@final
@dataclass(frozen=True)
class Entry:
    """Where a tensor stands in the file.

    Attributes:
        dtype: What its entries are.
        shape: Its shape.
        start: The first of its bytes in the file.
        stop: The first byte after it.
    """

    dtype: torch.dtype
    shape: torch.Size
    start: int
    stop: int


def read_header(file: MappedFile) -> tuple[dict[str, Entry], dict[str, str]]:
    """Returns the table of tensors by name, in the order of the file, and the texts beside it.

    Raises:
        CheckpointError: The file is truncated, or the table says what cannot be; names the tensor.
    """
    length = int.from_bytes(file.read(0, LENGTH_BYTES), "little")
    begin = LENGTH_BYTES + length
    if file.size < LENGTH_BYTES or begin > file.size:
        raise CheckpointError(
            f"'{file.path}' is not a safetensors file, or it was truncated: it has {file.size} bytes, and its header "
            f"claims {length}. Copy or download it again."
        )
    _LIMIT.check(length, f"The header of '{file.path}' has")
    try:
        content = json.loads(file.read(LENGTH_BYTES, length).decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as failure:
        said = "it is nested too deeply" if isinstance(failure, RecursionError) else str(failure)[:200]
        raise _damaged(file, f"its header is no table of tensors ({said})") from failure
    if not isinstance(content, dict):
        raise _damaged(file, "its header is no table of tensors")
    texts = content.pop(_TEXTS, {})
    if not isinstance(texts, dict) or not all(isinstance(text, str) for text in texts.values()):
        raise _damaged(file, f"'{_TEXTS}' in its header is no mapping of texts")
    entries = {name: _entry(file, name, value, begin) for name, value in content.items()}
    _check_apart(file, entries)
    return entries, texts


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for name, value in pairs:
        if name in content:
            raise ValueError(f"'{name[:80]}' stands in it twice")
        content[name] = value
    return content


def _entry(file: MappedFile, name: str, value: object, begin: int) -> Entry:
    check_tensor_name(name, f"'{file.path}'")
    if not isinstance(value, Mapping):
        raise _damaged(file, f"tensor '{name}' in its header is a {type(value).__name__}")
    kind = value.get("dtype")
    dtype = _DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise CheckpointError(
            f"'{name[:80]}' in '{file.path}' is of the type {str(kind)[:40]}, in which nothing can be computed here. "
            "Convert it to bfloat16 or float32 with the tool that made it."
        )
    shape, place = _whole(value.get("shape")), _whole(value.get("data_offsets"))
    if shape is None or place is None or len(place) != 2:
        raise _damaged(file, f"tensor '{name[:80]}' has a shape or offsets that are no whole numbers")
    start, stop = begin + place[0], begin + place[1]
    if stop > file.size:
        raise CheckpointError(
            f"'{file.path}' is truncated: it ends before its tensor '{name[:80]}' does. Copy or download it again."
        )
    if start > stop or stop - start != math.prod(shape) * dtype.itemsize:
        raise _damaged(file, f"tensor '{name[:80]}' does not fill its place in the file")
    if any(size >= 2**63 for size in shape):
        raise _damaged(file, f"tensor '{name[:80]}' has a shape that is too large")
    return Entry(dtype, torch.Size(shape), start, stop)


def _whole(numbers: object) -> list[int] | None:
    # A boolean is a whole number to Python.
    if (
        not isinstance(numbers, list)
        or len(numbers) > 64
        or not all(type(size) is int and size >= 0 for size in numbers)
    ):
        return None
    return numbers


def _check_apart(file: MappedFile, entries: Mapping[str, Entry]) -> None:
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
    for (name, entry), (other, later) in itertools.pairwise(ordered):
        if later.start < entry.stop and later.start < later.stop:
            raise _damaged(file, f"tensors '{name[:80]}' and '{other[:80]}' lie over each other")


def _damaged(file: MappedFile, what: str) -> CheckpointError:
    return CheckpointError(f"'{file.path}' is damaged: {what}. Copy or download it again.")
