"""Names of files as they stand in files that are sent on: no absolute path, and so no name of a user.

A relative name stays as it was typed. An absolute one is written relative to the working folder where it lies in that,
and without its folder where it does not.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_plus

# An absolute path in a sentence: in quotes, or up to what a name of a folder rarely holds.
_QUOTED_PATH = re.compile(r"(?<=')/[^']*(?=')")
_FOLDERS = re.compile(r"(?<![\w.~/-])/(?:[^/\s'\"<>|:;,()]+/)+(?=[^/\s])")


def portable_path(name: str) -> str:
    """Returns the name of a file without what only this machine has.

    Example:
        >>> portable_path("/home/me/a.pt"), portable_path("../models/a.pt"), portable_path(f"{Path.cwd()}/runs/a.pt")
        ('a.pt', '../models/a.pt', 'runs/a.pt')
    """
    if not os.path.isabs(name):
        return name
    path, here = Path(os.path.normpath(name)), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else path.name


def portable_spec(text: str) -> str:
    """Returns a SPEC whose file, and what is a file among its arguments, is named so.

    Example:
        >>> portable_spec("/home/me/nets.py:mlp?hidden=64&start=/home/me/start.pt")
        'nets.py:mlp?hidden=64&start=start.pt'
    """
    target, mark, query = text.partition("?")
    place, colon, name = target.rpartition(":")
    named = f"{portable_path(place)}{colon}{name}" if colon else portable_path(target)
    return named + mark + "&".join(map(_portable_argument, query.split("&")))


def _portable_argument(pair: str) -> str:
    key, equals, value = pair.partition("=")
    plain = unquote_plus(value)
    return f"{key}{equals}{quote(portable_path(plain), safe='/')}" if os.path.isabs(plain) else pair


def portable_value(value: Any) -> Any:
    """Returns the value of an option; one that is an absolute path is named so."""
    return portable_path(value) if isinstance(value, str) else value


def portable_text(text: str) -> str:
    """Returns a sentence in which absolute paths are named so.

    Example:
        >>> portable_text("'/home/me/my data/x.npz' has no test part, says /usr/lib/reader.py.")
        "'x.npz' has no test part, says reader.py."
    """
    named = _QUOTED_PATH.sub(lambda path: portable_spec(path[0]), text)
    return _FOLDERS.sub("", named.replace(f"{Path.cwd()}{os.sep}", ""))
