"""The command ``mergeot demo``: the main job on scikit-learn's bundled digits, from training to a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_ot import hookimpl

if TYPE_CHECKING:
    import typer


@hookimpl
def mergeot_commands(app: typer.Typer) -> None:
    """Adds ``mergeot demo``."""
    from mergeot_demo.command import demo

    app.command(
        "demo", epilog="Example: mergeot demo --output ./mergeot-demo --seed 0", rich_help_panel="Learn and set up"
    )(demo)
