"""The paper's experiments: trains (once), fuses, and prints tables with mean and standard deviation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergekit_ot import hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def mergeot_architectures() -> Mapping[str, str]:
    """Return the networks of this package by name."""
    families = ("bert", "gpt2", "llama", "t5", "vit", "whisper")
    small = {f"small-{family}": f"mergeot_experiments.sources.transformers:{family}" for family in families}
    return {"rows": "mergeot_experiments.sources.networks:rows", **small}


@hookimpl
def mergeot_commands(app: typer.Typer) -> None:
    """Adds ``mergeot experiments``."""
    from mergeot_experiments.command import app as experiments

    app.add_typer(experiments, name="experiments")
