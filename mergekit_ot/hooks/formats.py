"""The formats that plugins bring, asked one after another; what one does wrong is told by its name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from mergekit_ot.errors import PluginError
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.scoring.requests import DataReader, DataRequest
from mergekit_ot.storage.checkpoint import Loader, Saver
from mergekit_ot.storage.record import Checkpoint


def readers(manager: PluginManager, *, is_trusted: bool = False) -> list[Loader]:
    """Returns the readers of all formats, in the order in which they are asked; they are told of trust in programs."""
    return [functools.partial(_read, call, is_trusted=is_trusted) for call in manager.calls("mergeot_load_checkpoint")]


def writers(manager: PluginManager) -> list[Saver]:
    """Returns the writers of all formats, in the order in which they are asked."""
    calls = manager.calls("mergeot_save_checkpoint")
    return [functools.partial(_write, call) for call in calls]


def data_reader(manager: PluginManager, request: DataRequest) -> DataReader | None:
    """Returns what reads a file or a folder of data, from the first plugin that knows it; None where none does.

    Raises:
        DataError: It is known, and damaged or asked for wrongly.
        PluginError: A plugin returned something that reads nothing.
    """
    for call in manager.calls("mergeot_open_data"):
        found: Any = call(request=request)
        if found is not None and not callable(found):
            raise PluginError(
                f"A plugin's mergeot_open_data returned a {type(found).__name__} for '{request.path}', and not a "
                "function or None. Find the plugin with 'mergeot plugins' and leave it out with MERGEOT_PLUGINS."
            )
        if found is not None:
            return cast("DataReader", found)
    return None


def check_format(manager: PluginManager, path: Path, template: Checkpoint | None) -> None:
    """Checks that a checkpoint with the program of `template` can be written to `path`.

    Raises:
        CheckpointError: A format holds a program, and there is none that is trusted.
    """
    for call in manager.calls("mergeot_check_output"):
        call(path=path, template=template)


def _write(call: Callable[..., Any], path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> Any:
    try:
        return call(path=path, state=state, metadata=metadata)
    except PluginError as error:
        # That there is no room is not the format's fault, and told by whoever replaces the file.
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise


def _read(call: Callable[..., Any], path: Path, *, is_trusted: bool) -> Checkpoint | None:
    found = call(path=path, is_trusted=is_trusted)
    if found is None or isinstance(found, Checkpoint):
        return found
    raise PluginError(
        f"A plugin's mergeot_load_checkpoint returned a {type(found).__name__} for '{path}', and not a Checkpoint or "
        "None. Find the plugin with 'mergeot plugins' and leave it out with MERGEOT_PLUGINS."
    )
