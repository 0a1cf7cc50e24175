"""Folders of the `transformers` library as checkpoints, and rules for modules whose operations tell too little.

The rules import no `transformers`: a module is known by the name of its class. Folders need it (extra ``hf``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_ot import NodeRule, hookimpl
from mergekit_ot.errors import CheckpointError

if TYPE_CHECKING:
    from mergekit_ot import Checkpoint

_INDEX = ".index.json"
# A repository of the hub, which may stand in the cache of this machine.
_CACHED = re.compile(r"(?P<repository>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)
# Outputs that are files even where the sources are folders.
_FILES = (".pt", ".pth", ".pt2", ".bin", ".ckpt", ".safetensors")


@hookimpl
def mergeot_node_rules() -> Mapping[str, NodeRule | str]:
    """Return rules of modules, by class name."""
    from mergeot_transformers.experts import EXPERTS

    return EXPERTS


# After formats that know their own folders.
@hookimpl(trylast=True)
def mergeot_load_checkpoint(path: Path) -> Checkpoint | None:
    """Return the checkpoint where `path` is a folder with a ``config.json`` and weights; no code of it is run."""
    name = _CACHED.fullmatch(path.as_posix())
    if name is not None and not path.exists():
        from mergeot_transformers.cache import cached_folder

        path = cached_folder(name["repository"], name["revision"]) or path
    if path.is_dir():
        if not (path / "config.json").is_file():
            return None
        from mergeot_transformers.folder import load_folder

        return load_folder(path)
    if path.name.endswith(_INDEX) and path.is_file():
        raise CheckpointError(
            f"'{path}' is the index of weights that stand in several files. Name its folder: '{path.parent}'."
        )
    return None


@hookimpl
def mergeot_check_output(path: Path, template: Checkpoint | None) -> None:
    """Refuse a folder as the output where something that belongs into it cannot be copied."""
    if template is None or template.form is None or not template.form.is_folder or path.suffix.lower() in _FILES:
        return
    from mergeot_transformers.form import FolderForm

    if isinstance(template.form, FolderForm):
        template.form.check()
