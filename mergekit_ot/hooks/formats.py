"""The formats that plugins bring, asked one after another; what one does wrong is told by its name."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mergekit_ot.errors import PluginError
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.storage.checkpoint import Loader, Saver
from mergekit_ot.storage.record import Checkpoint


def readers(manager: PluginManager) -> list[Loader]:
    """Returns the readers of all formats, in the order in which they are asked."""
    return [functools.partial(_read, call) for call in manager.calls("mergeot_load_checkpoint")]


def writers(manager: PluginManager) -> list[Saver]:
    """Returns the writers of all formats, in the order in which they are asked."""
    calls = manager.calls("mergeot_save_checkpoint")
    return [lambda path, state, metadata, call=call: call(path=path, state=state, metadata=metadata) for call in calls]


def _read(call: Callable[..., Any], path: Path) -> Checkpoint | None:
    found = call(path=path)
    if found is None or isinstance(found, Checkpoint):
        return found
    raise PluginError(
        f"A plugin's mergeot_load_checkpoint returned a {type(found).__name__} for '{path}', and not a Checkpoint or "
        "None. Find the plugin with 'mergeot plugins' and leave it out with MERGEOT_PLUGINS."
    )
