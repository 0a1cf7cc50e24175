"""Records that are kept between runs: plain data in small files, which may be lost, damaged or foreign at any time."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from mergekit_ot.errors import CheckpointError
from mergekit_ot.storage.files import write_text
from mergekit_ot.storage.regular import read_bounded

VARIABLE = "MERGEOT_CACHE"
OFF = "off"
_FORMAT = "mergeot record"
_VERSION = 1
_NAME = re.compile(r"[0-9a-f]{64}\.json", re.ASCII)
_MOST_BYTES = 64 << 20
_MOST_RECORDS = 1000
_LARGEST = 16 << 20


def user_folder() -> Path | None:
    """Returns the folder for what is kept between runs: ``MERGEOT_CACHE``, or the user's; None where it is off."""
    chosen = os.environ.get(VARIABLE, "").strip()
    if chosen.lower() == OFF:
        return None
    if chosen:
        return Path(chosen)
    try:
        home = Path.home()
    except RuntimeError:
        return None
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local") / "mergeot" / "Cache"
    if sys.platform == "darwin":
        return home / "Library" / "Caches" / "mergeot"
    shared = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path there is to be ignored, says the rule that it comes from.
    return (Path(shared) if os.path.isabs(shared) else home / ".cache") / "mergeot"


@final
@dataclass(frozen=True)
class KeptRecords:
    """Plain data by key, in a folder of bounded size; what was not used for longest is dropped first.

    Nothing that goes wrong here is an error: what cannot be read is not there, what cannot be written is not kept.

    Attributes:
        folder: Where they stand; it is made when the first is written.
        most_bytes: Of all records together.
        most_records: Their number.
    """

    folder: Path
    most_bytes: int = _MOST_BYTES
    most_records: int = _MOST_RECORDS

    def read(self, key: str) -> object:
        """Returns what is kept under a key, as JSON gives it; None where nothing is that can be relied on."""
        path = self._path(key)
        try:
            # Looked at first: of a missing file the reader would say more than is asked for.
            if not path.is_file():
                return None
            found = json.loads(read_bounded(path, _LARGEST).decode("utf-8"))
            content = found["content"]
            expected = {"format": _FORMAT, "version": _VERSION, "key": key, "sha256": _digest(content)}
            if {name: found[name] for name in expected} != expected:
                return None
            os.utime(path)
        except (OSError, CheckpointError, ValueError, TypeError, KeyError, RecursionError):
            return None
        return content

    def write(self, key: str, content: Mapping[str, Any]) -> None:
        """Keeps plain data under a key, as a whole or not at all."""
        record = {"format": _FORMAT, "version": _VERSION, "key": key, "sha256": _digest(content), "content": content}
        text = json.dumps(record, separators=(",", ":"))
        if len(text) > min(_LARGEST, self.most_bytes):
            return
        with contextlib.suppress(OSError, CheckpointError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_text(self._path(key), text, overwrite=True)
            self._drop_oldest()

    def sizes(self) -> dict[Path, int]:
        """Returns the file of each record with its size in bytes, the last used first."""
        found: dict[Path, tuple[float, int]] = {}
        with contextlib.suppress(OSError):
            for entry in os.scandir(self.folder):
                with contextlib.suppress(OSError):
                    if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        found[Path(entry.path)] = status.st_mtime, status.st_size
        return {path: found[path][1] for path in sorted(found, key=lambda path: found[path], reverse=True)}

    def clear(self) -> int:
        """Removes all records, and returns how many there were."""
        return sum(map(_removed, self.sizes()))

    def _drop_oldest(self) -> None:
        total = 0
        for number, (path, size) in enumerate(self.sizes().items()):
            total += size
            if number >= self.most_records or total > self.most_bytes:
                _removed(path)

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.json"


def _removed(path: Path) -> bool:
    try:
        path.unlink()
    except OSError:
        return False
    return True


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()
