"""The command ``mergeot cache``: what is kept between runs."""

from __future__ import annotations

from typing import Annotated

import typer

from mergekit_ot.cli import output
from mergekit_ot.cli.options import Json


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Remove all that is kept.")] = False,
    as_json: Json = False,
) -> None:
    """Show which traces of architectures are kept between runs, and where; nothing in them is ever executed."""
    from mergekit_ot.jobs.keeping import kept_traces

    kept = kept_traces(clear=clear)
    folder = None if kept.folder is None else str(kept.folder)
    if as_json:
        output.show_json({"folder": folder, "traces": kept.count, "bytes": kept.size, "removed": kept.removed})
        return
    if folder is None:
        output.note("Nothing is kept: MERGEOT_CACHE is off.")
        return
    if clear:
        output.note(f"Removed: {kept.removed}.")
    output.note(
        f"{kept.count} traces, {kept.size} bytes. Another folder, or none: MERGEOT_CACHE=FOLDER, MERGEOT_CACHE=off."
    )
    output.show_path(folder)
