"""How a file says that mergeot wrote it: a mark among its first or last bytes; to read it unfolds and runs nothing."""

from __future__ import annotations

import re
import zipfile
from pathlib import Path

MARK = "written by mergeot"
# A text file ends with the mark as a comment; the formats say how one is written.
XML_COMMENT = "<!-- {} -->"
DOT_COMMENT = "// {}"
YAML_COMMENT = "# {}"
# What the pictures say about the program that drew them.
DRAWN_BY = "mergeot"
JSON_KEY = "made_by"

_LOOKED_AT = 4096
_STARTS = (
    # A dict that torch pickled, whose first entry is the format: uncompressed at the start of the archive.
    rb"PK\x03\x04.{26,400}\x80\x02}q\x00\(X\x06\0\0\0formatq\x01X\x0b\0\0\0mergekit_otq",
    # The metadata as JSON text, plain or as a string inside JSON: in the header of a file of tensors.
    rb'.{0,400}\\?"format\\?": ?\\?"mergekit_ot\\?"',
    rb'\s*\{\s*"made_by": "mergekit_ot ',
    rb"\x89PNG.{0,400}Software\0mergeot",
)
_ENDS = (
    rb"(?:<!--|//|#) written by mergeot(?: -->)?\s*\Z",
    rb"PK\x05\x06.{16}\x12\0written by mergeot\Z",
    rb"/Creator \(mergeot\).{0,3000}%%EOF\s*\Z",
)
_START = re.compile(b"|".join(_STARTS), re.DOTALL)
_END = re.compile(b"|".join(_ENDS), re.DOTALL)


def is_ours(path: Path) -> bool:
    """Returns whether a file carries the mark of mergeot.

    Raises:
        OSError: It cannot be read.
    """
    with path.open("rb") as stream:
        start = stream.read(_LOOKED_AT)
        size = stream.seek(0, 2)
        stream.seek(max(0, size - _LOOKED_AT))
        end = stream.read(_LOOKED_AT)
    return _START.match(start) is not None or _END.search(end) is not None


def with_mark(text: str, comment: str) -> str:
    r"""Returns a text that ends with the mark; `comment` says how its format writes a comment, with ``{}`` in it.

    Example:
        >>> with_mark("a: 1", YAML_COMMENT)
        'a: 1\n# written by mergeot\n'
    """
    return f"{text.removesuffix(chr(10))}\n{comment.format(MARK)}\n"


def mark_archive(path: Path) -> None:
    """Marks a zip archive that does not carry its metadata, by its comment; nothing else changes."""
    if not is_ours(path) and zipfile.is_zipfile(path):
        with zipfile.ZipFile(path, "a") as archive:
            archive.comment = MARK.encode()
