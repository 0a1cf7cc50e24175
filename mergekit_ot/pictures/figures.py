"""Writing what matplotlib has drawn."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from mergekit_ot.storage.marks import DRAWN_BY, XML_COMMENT, with_mark
from mergekit_ot.storage.replacing import replacing

# What a picture of each format says of itself; without a date, so that the same picture is the same file.
_METADATA: dict[str, dict[str, Any]] = {
    "png": {"Software": DRAWN_BY},
    "pdf": {"Creator": DRAWN_BY, "CreationDate": None},
    "svg": {"Date": None},
}


def save_figure(figure: Any, path: Path, *, overwrite: bool = False) -> None:
    """Writes a figure as a whole or not at all; the extension names the format.

    Args:
        figure: A figure of matplotlib.
        path: A ``.png``, ``.pdf`` or ``.svg`` file.
        overwrite: Whether a file that mergeot did not write may be replaced.

    Raises:
        CheckpointError: The file may not be written, or writing failed.

    Example:
        >>> import tempfile
        >>> from matplotlib.figure import Figure
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_figure(Figure(), Path(folder, "empty.svg"))
        ...     Path(folder, "empty.svg").is_file()
        True
    """
    import matplotlib

    kind = path.suffix.lower().lstrip(".")
    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": DRAWN_BY}):
        figure.savefig(drawn, format=kind, dpi=200, metadata=_METADATA[kind])
    content = drawn.getvalue()
    if kind == "svg":
        content = with_mark(content.decode("utf-8"), XML_COMMENT).encode("utf-8")
    with replacing(path, overwrite=overwrite) as beside:
        beside.write_bytes(content)
