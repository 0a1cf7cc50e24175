"""What commands keep between runs: the traces of architectures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mergekit_ot.storage.kept import KeptRecords, user_folder

_TRACES = "traces"


@dataclass(frozen=True)
class KeptTraces:
    """What is kept, for the user.

    Attributes:
        folder: Where; None where nothing is kept.
        count: Number of traces.
        size: Bytes of all together.
        removed: How many were removed just now.
    """

    folder: Path | None
    count: int
    size: int
    removed: int


def user_traces() -> KeptRecords | None:
    """Returns where the user's commands keep traces; None where they do not."""
    folder = user_folder()
    return None if folder is None else KeptRecords(folder / _TRACES)


def kept_traces(*, clear: bool = False) -> KeptTraces:
    """Returns what is kept, after removing it if asked to."""
    records = user_traces()
    if records is None:
        return KeptTraces(None, 0, 0, 0)
    removed = records.clear() if clear else 0
    sizes = records.sizes()
    return KeptTraces(records.folder, len(sizes), sum(sizes.values()), removed)
