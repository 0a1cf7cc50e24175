"""What a user would take instead, run from where it is installed outside this repository.

``MERGEOT_PEERS`` names a folder with what there is of: checkouts ``git-re-basin-pytorch`` and ``otfusion``, a folder
``site`` into which ``pip install --target`` has put ``rebasin`` and ``torch-pruning``, and a virtual environment
``mergekit``. What is missing is left out of the table and named under it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock


class MissingPeerError(Exception):
    """A peer is not installed where it is looked for."""


def folder() -> Path:
    """Returns where peers are.

    Raises:
        MissingPeerError: Nobody said.
    """
    if not os.environ.get("MERGEOT_PEERS"):
        raise MissingPeerError("MERGEOT_PEERS names no folder of peers")
    return Path(os.environ["MERGEOT_PEERS"])


def module(place: str, name: str, left_out: tuple[str, ...] = ()) -> ModuleType:
    """Returns a module of a peer; what it imported by itself is taken out of the way of the next one.

    Args:
        place: Its folder in that of the peers.
        name: The module.
        left_out: Modules that it imports and that what is measured does not use.

    Raises:
        MissingPeerError: It is not there, or cannot be imported.
    """
    home = folder() / place
    known = set(sys.modules)
    sys.path.insert(0, str(home))
    sys.modules.update({name: MagicMock() for name in left_out})
    try:
        with quiet():
            return importlib.import_module(name)
    except Exception as error:
        raise MissingPeerError(f"{name} cannot be imported from '{place}': {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(home))
        for added in set(sys.modules) - known:
            file = getattr(sys.modules[added], "__file__", None) or ""
            if added in left_out or (place != "site" and str(file).startswith(str(home))):
                del sys.modules[added]


def program(place: str, name: str) -> Path:
    """Returns a program of a peer that has an environment of its own.

    Raises:
        MissingPeerError: It is not there.
    """
    path = folder() / place / "bin" / name
    if not path.is_file():
        raise MissingPeerError(f"'{place}/bin/{name}' is not there")
    return path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Lets nothing through that a peer prints."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
