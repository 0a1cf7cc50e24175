"""Small JSON files of a folder that somebody else may have made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mergekit_ot import Limit, MappedFile
from mergekit_ot.errors import CheckpointError

_LIMIT = Limit("MERGEOT_MAX_HEADER_BYTES", 16 << 20)


def read_json(path: Path) -> dict[str, Any]:
    """Returns the mapping that stands in a JSON file.

    Raises:
        CheckpointError: It is too large, damaged, or no mapping.
    """
    with MappedFile(path) as file:
        _LIMIT.check(file.size, f"'{path}' has")
        content = file.read(0, file.size)
    try:
        found = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as failure:
        said = "it is nested too deeply" if isinstance(failure, RecursionError) else str(failure)[:200]
        raise CheckpointError(f"'{path}' is no valid JSON ({said}). Copy or download it again.") from failure
    if not isinstance(found, dict):
        raise CheckpointError(f"'{path}' is no mapping of names to values. Copy or download it again.")
    return found


def json_bytes(content: object) -> bytes:
    """Returns the bytes of a JSON file, as the library writes them."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode("utf-8")
