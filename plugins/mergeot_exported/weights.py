"""Reads the raw weights of an exported program and nothing else: no graph, no pickle, no member that it does not need.

The file is an archive. One member, written as JSON, says for every weight which member holds its numbers, of which type
and shape; the numbers stand there as they are in memory. Whatever is said in another way is refused.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from mergekit_ot import Checkpoint, CheckpointError, MemoryStore

_TABLE = "data/weights/model_weights_config.json"
_FOLDER = "data/weights/"
_ORDER = "byteorder"
_PLACE = re.compile(r"weight_[0-9]{1,9}", re.ASCII)
# The numbers of the types as torch.export.save writes them.
_TYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    9: torch.complex32,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
    28: torch.uint16,
    29: torch.float8_e4m3fn,
    30: torch.float8_e5m2,
    31: torch.float8_e4m3fnuz,
    32: torch.float8_e5m2fnuz,
    34: torch.uint32,
    35: torch.uint64,
}
_STRIDED = 7
_MOST_AXES = 64
_MOST_TABLE_BYTES = 1 << 26
_LARGEST_INTEGER = 1 << 48
_IS_ENCRYPTED = 1


class _Refused(Exception):
    """What stands in the file is not a raw weight; the message says what it is."""


def load_weights(path: Path) -> Checkpoint:
    """Returns the weights of an exported program as a checkpoint without a program; the program is not touched.

    Raises:
        CheckpointError: The file is damaged, or keeps weights in another way than as raw numbers.
    """
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"'{path}' is not an exported program, or it is truncated. Write it with torch.export.save."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            state = _Reader(archive, path.stat().st_size).weights()
    except _Refused as refused:
        raise CheckpointError(
            f"'{path}' is not trusted, so only raw weights are taken from it, and {refused}. Nothing was executed. "
            f"Pass --trust {path} if you trust who made it; if not, ask for the weights as a .safetensors file."
        ) from refused
    except Exception as error:  # whatever a damaged archive raises
        raise CheckpointError(
            f"'{path}' is damaged ({type(error).__name__}: {error}). Copy it again, or write it with torch.export.save."
        ) from error
    found = f"exported program with {len(state)} raw weights; nothing else of it is read, as it is not trusted"
    return Checkpoint(path, MemoryStore(state), found=found, has_untouched_program=True)


class _Reader:
    """Reads members of an archive that are stored as they are, each at most once, never more than the file has."""

    def __init__(self, archive: zipfile.ZipFile, size: int) -> None:
        self._archive, self._left = archive, size
        members = archive.infolist()
        self._members = {member.filename: member for member in members}
        self._has_doubles = len(self._members) < len(members)
        self._root = members[0].filename.partition("/")[0] if members else ""
        self._contents: dict[str, Tensor] = {}

    def weights(self) -> dict[str, Tensor]:
        """Returns name → tensor."""
        if self._has_doubles:
            raise _Refused("two of its members have one name")
        if f"{self._root}/{_ORDER}" in self._members and self._read(_ORDER, 16) != b"little":
            raise _Refused("its numbers are not little-endian")
        if f"{self._root}/{_TABLE}" not in self._members:
            raise _Refused(f"it has no table of them ('{_TABLE}': torch.export.save of torch 2.9 or newer writes one)")
        try:
            table = json.loads(self._read(_TABLE, _MOST_TABLE_BYTES).decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise _Refused("its table of them is no valid JSON") from error
        entries = table.get("config") if isinstance(table, dict) else None
        if not isinstance(entries, dict) or not entries:
            raise _Refused("its table of them is empty or no table")
        return {name: self._weight(name, entry) for name, entry in entries.items()}

    def _weight(self, name: str, entry: object) -> Tensor:
        if not isinstance(entry, dict) or entry.get("use_pickle") is not False:
            raise _Refused(f"it keeps '{name}' as a pickle, which could run code")
        place, described = entry.get("path_name"), entry.get("tensor_meta")
        if not isinstance(place, str) or not _PLACE.fullmatch(place) or not isinstance(described, dict):
            raise _Refused(f"the place or the type of '{name}' is not what torch.export.save writes")
        if described.get("layout") != _STRIDED:
            raise _Refused(f"'{name}' is not a dense tensor")
        number = described.get("dtype")
        kind = _TYPES.get(number) if isinstance(number, int) and not isinstance(number, bool) else None
        if kind is None:
            raise _Refused(f"'{name}' has a type of numbers that is not known ({number})")
        sizes, strides = (_integers(described.get(key), name) for key in ("sizes", "strides"))
        (offset,) = _integers([described.get("storage_offset")], name)
        return _view(self._content(place), kind, sizes, strides, offset, name)

    def _content(self, place: str) -> Tensor:
        if place not in self._contents:
            content = self._read(_FOLDER + place, self._left)
            self._contents[place] = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0).byte()
        return self._contents[place]

    def _read(self, name: str, most: int) -> bytearray:
        member = self._members.get(f"{self._root}/{name}")
        if member is None:
            raise _Refused(f"its member '{name}' is missing")
        size = member.file_size
        if (
            member.compress_type != zipfile.ZIP_STORED
            or member.compress_size != size
            or member.flag_bits & _IS_ENCRYPTED
        ):
            raise _Refused(f"its member '{name}' is compressed or encrypted, which torch.export.save never does")
        # Members may overlap: together they are not larger than the file all the same.
        if size > min(most, self._left):
            raise _Refused(f"its member '{name}' is larger than it can be ({size} bytes)")
        self._left -= size
        with self._archive.open(member) as stream:
            content = bytearray(stream.read(size + 1))
        if len(content) != size:
            raise _Refused(f"its member '{name}' is truncated")
        return content


def _integers(values: object, name: str) -> list[int]:
    """Returns plain integers that are written as such; a size that is an expression would have to be evaluated."""
    if not isinstance(values, list) or len(values) > _MOST_AXES:
        raise _Refused(f"the shape of '{name}' is no list of sizes")
    numbers: list[int] = []
    for value in values:
        number = value.get("as_int") if isinstance(value, Mapping) and len(value) == 1 else None
        if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number < _LARGEST_INTEGER:
            raise _Refused(f"the shape of '{name}' does not consist of plain integers")
        numbers.append(number)
    return numbers


def _view(content: Tensor, kind: torch.dtype, sizes: list[int], strides: list[int], offset: int, name: str) -> Tensor:
    """Returns the tensor that lies so in the bytes of a member."""
    count, width = math.prod(sizes), kind.itemsize
    if len(strides) != len(sizes) or len(content) % width:
        raise _Refused(f"the shape of '{name}' does not fit its numbers")
    if count == 0:
        return torch.zeros(sizes, dtype=kind)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if max(last + 1, count) * width > len(content):
        raise _Refused(f"'{name}' has more entries than its member holds")
    return content.view(kind).as_strided(sizes, strides, offset)
