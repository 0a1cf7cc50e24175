"""Arrays and numbers of NumPy, and namespaces, in pickles: made of their bytes here, without calling what is named."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from mergekit_ot.storage.pickles import AbstractBuilt, DamagedPickle, HeldBytes, Maker, Named

# Types by kind and bytes, as NumPy writes them, that torch has too.
_TYPES = {
    "b1": torch.bool,
    "u1": torch.uint8,
    "u2": torch.uint16,
    "u4": torch.uint32,
    "u8": torch.uint64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "c8": torch.complex64,
    "c16": torch.complex128,
}
_MOST_AXES = 64
_MODULES = ("core", "_core")


@final
class HeldType(AbstractBuilt):
    """A type of NumPy: its code, and once it is built the order of its bytes."""

    def __init__(self, code: object = "", *_: object) -> None:
        self.code = code if isinstance(code, str) else code.name.rpartition(".")[2] if isinstance(code, Named) else ""
        self.order = "<"

    def build(self, state: object) -> None:
        """Takes the order of the bytes."""
        order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
        self.order = ">" if order == ">" else "<"


@final
class HeldArray(AbstractBuilt):
    """An array of NumPy as a tensor, once it is built; None where torch has no such numbers."""

    def __init__(self, contents: _Contents) -> None:
        self._contents = contents
        self.tensor: Tensor | None = None

    def build(self, state: object) -> None:
        """Takes type, shape, order and bytes.

        Raises:
            DamagedPickle: They do not fit together.
        """
        if not isinstance(state, tuple) or len(state) < 4:
            raise DamagedPickle("an array without type, shape and bytes")
        shape, kind, is_fortran, content = state[-4:]
        self.tensor = self._contents.tensor(kind, shape, bool(is_fortran), content)


@final
class HeldNamespace(AbstractBuilt):
    """An ``argparse.Namespace`` of plain values."""

    def __init__(self, *_: object) -> None:
        self.values: dict[str, Any] = {}

    def build(self, state: object) -> None:
        """Takes the values by name."""
        if isinstance(state, Mapping):
            self.values = {key: value for key, value in state.items() if isinstance(key, str)}


def array_makers() -> dict[str, Maker]:
    """Returns what makes arrays, numbers and namespaces of what pickles name."""
    contents = _Contents()

    def from_buffer(content: object, kind: object, shape: object, order: object = "C", *_: object) -> HeldArray:
        array = HeldArray(contents)
        array.build((shape, kind, order == "F", content))
        return array

    def number(kind: object, content: object, *_: object) -> object:
        tensor = contents.tensor(kind, (), False, content)
        return None if tensor is None else tensor.item()

    return {
        # How no bytes are written.
        **{f"{module}.bytes": lambda *_: b"" for module in ("builtins", "__builtin__")},
        "numpy.dtype": HeldType,
        "argparse.Namespace": HeldNamespace,
        "_codecs.encode": lambda text="", *_: HeldBytes(text) if isinstance(text, str) else text,
        **{f"numpy.{core}.multiarray._reconstruct": lambda *_: HeldArray(contents) for core in _MODULES},
        **{f"numpy.{core}.multiarray.scalar": number for core in _MODULES},
        **{f"numpy.{core}.numeric._frombuffer": from_buffer for core in _MODULES},
    }


@final
class _Contents:
    """The bytes of arrays, each copied once, however many arrays a pickle makes of them."""

    def __init__(self) -> None:
        self._copied: dict[tuple[int, str], tuple[object, bytearray]] = {}

    def tensor(self, kind: object, shape: object, is_fortran: bool, content: object) -> Tensor | None:
        """Returns an array as a tensor, or None where torch has no such numbers.

        Raises:
            DamagedPickle: Type, shape and bytes do not fit together.
        """
        dtype = _TYPES.get(kind.code) if isinstance(kind, HeldType) else None
        if dtype is None or not isinstance(kind, HeldType):
            return None
        if not isinstance(shape, tuple) or len(shape) > _MOST_AXES or not all(map(_is_size, shape)):
            raise DamagedPickle("an array whose shape is no list of sizes")
        held = self._copy(content, kind.order + kind.code if kind.order == ">" else "")
        if math.prod(shape) * dtype.itemsize != len(held):
            raise DamagedPickle(f"an array of another size than its {len(held)} bytes")
        if not held:
            return torch.zeros(shape, dtype=dtype)
        flat = torch.frombuffer(held, dtype=dtype)
        if is_fortran:
            return flat.reshape(shape[::-1]).permute(*reversed(range(len(shape))))
        return flat.reshape(shape)

    def _copy(self, content: object, swapped: str) -> bytearray:
        origin = content.text if isinstance(content, HeldBytes) else content
        if (id(origin), swapped) not in self._copied:
            held = bytearray(_bytes_of(origin))
            if swapped:
                held = bytearray(np.frombuffer(held, swapped).byteswap().tobytes())
            self._copied[id(origin), swapped] = (origin, held)  # what is kept has its own identity
        return self._copied[id(origin), swapped][1]


def _bytes_of(content: object) -> bytes | bytearray:
    if isinstance(content, str):
        try:
            return content.encode("latin-1")
        except UnicodeEncodeError as failure:
            raise DamagedPickle("bytes of an array that are none") from failure
    if not isinstance(content, bytes | bytearray):
        raise DamagedPickle("an array that holds no bytes")
    return content


def _is_size(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**48
