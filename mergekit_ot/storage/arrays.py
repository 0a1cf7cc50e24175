"""Archives of NumPy arrays (``.npz``): every header is checked before an array is read, and nothing is unpickled."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import final

import numpy as np

from mergekit_ot.errors import DataError, MergeotError
from mergekit_ot.storage.archives import Archive
from mergekit_ot.storage.limits import shortened

_SUFFIX = ".npy"
# The longest header that NumPy reads by itself, and its magic and length before it.
_HEADER_BYTES = 10_000 + 12
# Kinds of numbers that torch has: booleans, whole numbers with and without a sign, fractions, complex ones.
_KINDS = "biufc"
_KIND_NAMES = {
    "O": "Python objects",
    "U": "text",
    "S": "bytes of text",
    "M": "dates",
    "m": "spans of time",
    "V": "records",
}


@final
class ArrayArchive:
    """An ``.npz`` archive that is open for reading.

    Args:
        path: The archive.
        error: What is raised where it is damaged.
        advice: What its arrays should be, for messages.

    Raises:
        MergeotError: It is damaged, or no archive.
    """

    def __init__(
        self,
        path: Path,
        error: type[MergeotError] = DataError,
        advice: str = "Save plain arrays, such as float32 inputs and int64 targets.",
    ) -> None:
        self.path, self._error, self._advice = path, error, advice
        self._archive = Archive(path, error)

    @property
    def names(self) -> list[str]:
        """Names of the arrays."""
        return [name.removesuffix(_SUFFIX) for name in self._archive.members]

    def read(self, name: str) -> np.ndarray:
        """Returns an array in the byte order of this machine.

        Raises:
            MergeotError: It holds no numbers, its shape does not fit its bytes, or it unfolds to more than the limit.
        """
        member = name + _SUFFIX
        if member not in self._archive.members:
            raise self._error(
                f"'{shortened(name)}' in '{self.path}' is no array, but another file. Save it with numpy.savez."
            )
        dtype, shape, is_fortran, begin = self._header(name, self._archive.read(member, _HEADER_BYTES))
        if (
            dtype.kind not in _KINDS
            or dtype.itemsize > 16
            or dtype.newbyteorder("=") in (np.longdouble, np.clongdouble)
        ):
            kind = _KIND_NAMES.get(dtype.kind, f"the type {shortened(dtype)}")
            raise self._error(f"'{shortened(name)}' in '{self.path}' holds {kind}, not numbers. {self._advice}")
        count, held = math.prod(shape), self._archive.members[member].size - begin
        if count * dtype.itemsize != held:
            raise self._error(
                f"'{shortened(name)}' in '{self.path}' is damaged: its header says that it is of shape "
                f"{'×'.join(shortened(size, 24) for size in shape[:8])}, and {held} bytes follow. Save it again."
            )
        array = np.empty(count, dtype)
        self._archive.read_into(member, begin, array.view(np.uint8).data)
        try:
            ordered = array.reshape(shape, order="F" if is_fortran else "C")
        except ValueError as failure:
            why = shortened(str(failure), 200)
            raise self._error(f"'{shortened(name)}' in '{self.path}' is damaged: {why}. Save it again.") from failure
        return ordered.astype(dtype.newbyteorder("="), copy=False)

    def _header(self, name: str, content: bytes) -> tuple[np.dtype, tuple[int, ...], bool, int]:
        """Returns type, shape and order of an array, and where its numbers begin."""
        stream = io.BytesIO(content)
        try:
            version = np.lib.format.read_magic(stream)
            reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, is_fortran, dtype = reader(stream)
        except Exception as failure:  # the header is a Python expression, and what fails in it is anything
            raise self._error(
                f"'{shortened(name)}' in '{self.path}' is no array of numbers, or damaged "
                f"({shortened(str(failure).splitlines()[0] if str(failure) else type(failure).__name__, 200)}). "
                "Save it again with numpy.savez."
            ) from failure
        if any(not isinstance(size, int) or isinstance(size, bool) or size < 0 for size in shape):
            raise self._error(f"'{shortened(name)}' in '{self.path}' is damaged: its shape is no list of sizes.")
        return dtype, shape, is_fortran, stream.tell()

    def close(self) -> None:
        """Closes the archive."""
        self._archive.close()

    def __enter__(self) -> ArrayArchive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
