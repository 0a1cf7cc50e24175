"""What ``mergeot experiments`` takes and prints."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mergeot_experiments.catalogue.descriptions import Experiment
    from mergeot_experiments.results.tables import ResultTable
    from mergeot_experiments.running.runner import Order

app = typer.Typer(
    no_args_is_help=True,
    help="Measure fusions over several seeds: trains (once), fuses, and prints tables with mean and deviation.",
    epilog="Example: mergeot experiments run mlp --seeds 2",
)
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else.")]


@app.command("list", epilog="Example: mergeot experiments list")
def list_experiments(as_json: Json = False) -> None:
    """List the experiments, their scales and how many sets of sources each has."""
    from mergeot_experiments.catalogue.registry import EXPERIMENTS

    rows = [_described(experiment) for experiment in EXPERIMENTS.values()]
    if as_json:
        print(json.dumps({"experiments": rows}))
        return
    for row in rows:
        sets = ", ".join(f"{count} at {scale}" for scale, count in row["sets"].items())
        _note(f"{row['name']}: {row['title']}\n    {row['summary']}\n    sets of sources: {sets}")


def _described(experiment: Experiment) -> dict[str, Any]:
    """Returns what ``list`` says about an experiment."""
    return {
        "name": experiment.name,
        "title": experiment.title,
        "summary": experiment.summary,
        "sets": {scale: make().repetitions for scale, make in experiment.designs.items()},
        "methods": [method.name for method in experiment.designs["quick"]().all_methods],
    }


@app.command("run", epilog="Example: mergeot experiments run recurrent --solver gwb --solver-option alpha=4 --seeds 2")
def run_experiments(
    names: Annotated[list[str], typer.Argument(metavar="NAME…", show_default=False, help="Experiments, or 'all'.")],
    is_quick: Annotated[
        bool, typer.Option("--quick/--full", help="Minutes to an hour on two cores, or the size of the paper.")
    ] = True,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, metavar="N", help="Sets of sources. Default: all there are.")
    ] = None,
    solver: Annotated[
        list[str] | None, typer.Option("--solver", metavar="NAME", help="Instead of the experiment's; repeatable.")
    ] = None,
    solver_option: Annotated[
        list[str] | None, typer.Option("--solver-option", metavar="KEY=VALUE", help="For every --solver; repeatable.")
    ] = None,
    measure: Annotated[
        str | None, typer.Option("--measure", metavar="NAME", help="What a neuron is seen by, for every --solver.")
    ] = None,
    refine: Annotated[bool, typer.Option("--refine", help="Sweep on from the couplings, for every --solver.")] = False,
    restarts: Annotated[
        int, typer.Option("--restarts", min=1, metavar="N", help="Align so often, for every --solver.")
    ] = 1,
    repair: Annotated[
        str | None, typer.Option("--repair", metavar="NAME", help="After the couplings, for every --solver.")
    ] = None,
    is_again: Annotated[bool, typer.Option("--again", help="Measure also what is stored already.")] = False,
    as_json: Json = False,
) -> None:
    """Train what is missing, fuse and score what was not measured yet, and print the tables.

    Every measurement is kept in the cache folder (MERGEOT_CACHE), so a run that was stopped goes on where it was.
    """
    options = _options(solver_option)
    _check_has_solver(
        solver,
        {
            "--solver-option": bool(options),
            "--measure": bool(measure),
            "--refine": refine,
            "--restarts": restarts > 1,
            "--repair": bool(repair),
        },
    )
    started = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):
        from mergeot_experiments.catalogue.descriptions import Method
        from mergeot_experiments.catalogue.registry import choose_scale, find_experiments
        from mergeot_experiments.running.runner import Order

        methods = tuple(Method(name, options, refine, restarts, measure, repair) for name in solver or ())
        orders = [
            Order(experiment, choose_scale(experiment, not is_quick), methods, seeds, is_again)
            for experiment in find_experiments(names)
        ]
        tables, refused = _run(orders)
    if as_json:
        content = {"experiments": [table.as_json() for table in tables], "not_possible": refused}
        print(json.dumps({**content, "seconds": time.perf_counter() - started}, allow_nan=False))


def _run(orders: Sequence[Order]) -> tuple[list[ResultTable], list[str]]:
    """Runs orders and shows their tables; returns these, and sentences on what is not possible."""
    from mergekit_ot import default_manager
    from mergeot_experiments.results.rendering import show
    from mergeot_experiments.running.progress import ProgressLine
    from mergeot_experiments.workflow import run_orders

    tables, refused = [], []
    for table, sentences in run_orders(orders, default_manager(), ProgressLine()):
        refused += sentences
        if table is not None:
            tables.append(table)
            show(table)
        for sentence in sentences:
            _note(f"not possible: {sentence}")
    return tables, refused


@app.command("table", epilog="Example: mergeot experiments table --output results.md")
def show_table(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME…]", show_default=False, help="Experiments. Default: all.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the page there.")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also replace a file that mergeot did not write.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Render all stored results as a page of markdown, each row with the command that made it."""
    with contextlib.redirect_stdout(sys.stderr):
        from mergekit_ot import default_manager
        from mergeot_experiments.results.rendering import as_markdown
        from mergeot_experiments.workflow import stored_tables, write_page

        tables = stored_tables(names or [], default_manager())
        if output is not None:
            write_page(tables, output, overwrite=overwrite)
    if as_json:
        print(json.dumps({"experiments": [table.as_json() for table in tables]}, allow_nan=False))
    else:
        print(as_markdown(tables) if output is None else output)


def _check_has_solver(solver: list[str] | None, given: Mapping[str, bool]) -> None:
    """Refuses flags that say how a solver is run where no solver is named."""
    for flag, is_given in given.items():
        if is_given and not solver:
            raise typer.BadParameter("name the --solver it belongs to", param_hint=flag)


def _options(texts: list[str] | None) -> dict[str, object]:
    options: dict[str, object] = {}
    for text in texts or ():
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise typer.BadParameter(f"'{text}' is not KEY=VALUE", param_hint="--solver-option")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    return options


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
