"""The command ``mergeot diagnose``: what networks have in common, and how to fuse them, before any fusion."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mergekit_ot import hookimpl

if TYPE_CHECKING:
    import typer

    from mergeot_diagnose.diagnosis import diagnose
    from mergeot_diagnose.findings import Diagnosis
    from mergeot_diagnose.picture import plot_diagnosis

# Imported on first use: `mergeot --help` must not pay for torch.
_HOMES = {
    "Diagnosis": "mergeot_diagnose.findings",
    "diagnose": "mergeot_diagnose.diagnosis",
    "plot_diagnosis": "mergeot_diagnose.picture",
}

__all__ = ["Diagnosis", "diagnose", "plot_diagnosis"]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'mergeot_diagnose' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


@hookimpl
def mergeot_commands(app: typer.Typer) -> None:
    """Adds ``mergeot diagnose``."""
    from mergeot_diagnose.command import diagnose_files

    example = "mergeot diagnose a.pt b.pt --arch nets.py:mlp --data mnist.npz --figure diagnosis.svg"
    app.command("diagnose", epilog=f"Example: {example}", rich_help_panel="Look at networks")(diagnose_files)
