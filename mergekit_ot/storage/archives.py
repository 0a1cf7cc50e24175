"""Zip archives: their directories are read and checked, and nothing is unfolded that nobody asked for."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from mergekit_ot.errors import CheckpointError, MergeotError
from mergekit_ot.storage.limits import HEADER_BYTES, check_unfolded, shortened
from mergekit_ot.storage.regular import open_regular

_LOCAL = struct.Struct("<4s22xHH")
_LOCAL_MAGIC = b"PK\x03\x04"
_ENCRYPTED = 1
_PART = 1 << 20
# What zipfile raises for damaged directories and members, which are many.
_DAMAGE = (zipfile.BadZipFile, ValueError, OSError, EOFError, struct.error, zlib.error)
_DAMAGE += (RuntimeError, LookupError, OverflowError)


@final
@dataclass(frozen=True)
class Member:
    """One file in an archive.

    Attributes:
        name: Its name.
        start: Where its bytes stand in the archive.
        stored: How many bytes stand there.
        size: How many they become.
        checksum: CRC-32 of what they become; zero where the writer left it out.
        is_packed: Whether the bytes in the archive are not those of the file.
    """

    name: str
    start: int
    stored: int
    size: int
    checksum: int
    is_packed: bool


class _BoundedReader(io.BufferedReader):
    """Refuses to read more at once than a directory may have, whatever the archive says that it has."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > HEADER_BYTES.value:
            raise zipfile.BadZipFile(
                f"its directory claims {size} bytes; the limit is {HEADER_BYTES.variable}={HEADER_BYTES.value}"
            )
        return super().read(size)


@final
class Archive:
    """A zip archive that is open for reading.

    Args:
        path: The archive.
        error: What is raised where it is damaged.

    Raises:
        MergeotError: It is no archive, its directory is damaged or too long, or a member is encrypted or there twice.
    """

    def __init__(self, path: Path, error: type[MergeotError] = CheckpointError) -> None:
        self.path, self._error = path, error
        self._stream = _BoundedReader(open_regular(path, error).detach())
        self._size = self._stream.seek(0, io.SEEK_END)
        try:
            self._zip = zipfile.ZipFile(self._stream)
            infos = self._zip.infolist()
            self.members: Mapping[str, Member] = {info.filename: self._member(info) for info in infos}
        except _DAMAGE as failure:
            self._stream.close()
            raise error(self._damaged(failure)) from failure
        if len(infos) != len(self.members):
            self.close()
            raise error(f"'{path}' is damaged: two files in this archive have the same name. Write or copy it again.")

    def _member(self, info: zipfile.ZipInfo) -> Member:
        if info.flag_bits & _ENCRYPTED:
            raise zipfile.BadZipFile(f"'{shortened(info.filename)}' in it is encrypted")
        self._stream.seek(info.header_offset)
        magic, name, extra = _LOCAL.unpack(self._stream.read(_LOCAL.size))
        start = info.header_offset + _LOCAL.size + name + extra
        is_packed = info.compress_type != zipfile.ZIP_STORED
        is_whole = start + info.compress_size <= self._size and (is_packed or info.compress_size == info.file_size)
        if magic != _LOCAL_MAGIC or not is_whole:
            raise zipfile.BadZipFile(f"its directory does not fit its file '{shortened(info.filename)}'")
        return Member(info.filename, start, info.compress_size, info.file_size, info.CRC, is_packed)

    def read(self, name: str, most: int | None = None) -> bytes:
        """Returns the bytes of a file in the archive.

        Args:
            name: The file.
            most: Only so many from its beginning; all of them by default.

        Raises:
            MergeotError: It is damaged, or it unfolds to more than the limit.
        """
        member = self.members[name]
        wanted = member.size if most is None else min(most, member.size)
        check_unfolded(wanted, member.stored, f"'{shortened(name)}' in '{self.path}' unfolds to", self._error)
        try:
            if not member.is_packed:
                self._stream.seek(member.start)
                content = io.BufferedReader.read(self._stream, wanted)
                if len(content) == member.size and member.checksum not in (0, zlib.crc32(content)):
                    raise zipfile.BadZipFile(f"the checksum of '{shortened(name)}' is wrong")
                return content
            with self._zip.open(name) as stream:
                return stream.read(wanted)
        except _DAMAGE as failure:
            raise self._error(self._damaged(failure)) from failure

    def read_into(self, name: str, start: int, target: memoryview) -> None:
        """Fills memory with the bytes of a file in the archive from `start` on.

        Raises:
            MergeotError: It is damaged or too short, or it unfolds to more than the limit.
        """
        member = self.members[name]
        check_unfolded(member.size, member.stored, f"'{shortened(name)}' in '{self.path}' unfolds to", self._error)
        try:
            with self._zip.open(name) as stream:
                stream.read(start)
                done = 0
                while done < len(target) and (part := stream.read(min(_PART, len(target) - done))):
                    target[done : done + len(part)] = part
                    done += len(part)
                stream.read(1)  # the checksum is compared at the end
            if done < len(target):
                raise EOFError(f"'{shortened(name)}' ends early")
        except _DAMAGE as failure:
            raise self._error(self._damaged(failure)) from failure

    def close(self) -> None:
        """Closes the archive."""
        self._zip.close()
        self._stream.close()

    def __enter__(self) -> Archive:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _damaged(self, failure: Exception) -> str:
        if isinstance(failure, zipfile.BadZipFile) and "not a zip file" in str(failure):
            return f"'{self.path}' is truncated: the end of the archive is missing. Copy or download it again."
        said = shortened(str(failure), 200) or type(failure).__name__
        return f"'{self.path}' is damaged: {said}. Copy or download it again."
