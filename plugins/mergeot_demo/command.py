"""What ``mergeot demo`` takes and prints."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mergeot_demo.run import DemoResult


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Folder to write to.")] = Path(
        "mergeot-demo"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Seed of the two trainings and of the fusions.")] = 0,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also replace files that mergeot did not write.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else.")
    ] = False,
) -> None:
    """Train two small networks on scikit-learn's digits, fuse them with every solver, and compare.

    Writes the networks, the best fusion, the data and a picture of the barrier; takes well under two minutes.
    """
    with contextlib.redirect_stdout(sys.stderr):
        from mergeot_demo.run import run_demo

        result = run_demo(output, seed, _note, overwrite=overwrite)
    if as_json:
        print(json.dumps(result.as_json(), allow_nan=False))
        return
    _show(result)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _show(result: DemoResult) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title="Accuracy on 500 digits that no network was trained on", title_justify="left")
    for name, justify in (("network", "left"), ("accuracy", "right"), ("seconds", "right"), ("", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for row in result.rows:
        accuracy = "–" if row.accuracy is None else f"{row.accuracy:.1f} %"
        seconds = "–" if row.seconds is None else f"{row.seconds:.2f}"
        table.add_row(Text(row.name), accuracy, seconds, Text(row.remark))
    width = None if sys.stderr.isatty() else 110
    Console(file=sys.stderr, width=width, highlight=False).print(table)
    _note(
        f"Error barrier between the two: {_points(result.naive_barrier)} as they are, "
        f"{_points(result.aligned_barrier)} aligned by {result.best}."
    )
    _note(f"Picture: {result.picture}")
    _note("\nTry next:")
    for command in result.commands:
        _note("  " + shlex.join(command))


def _points(height: float | None) -> str:
    return "unknown" if height is None else f"{height:.1f} percent points"
