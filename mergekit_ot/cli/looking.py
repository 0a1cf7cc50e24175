"""The commands that look at checkpoints without changing them, and the one that lists plugins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergekit_ot.cli import output
from mergekit_ot.cli.flags import takes_options
from mergekit_ot.cli.options import (
    Arch,
    Data,
    Json,
    Model,
    Models,
    Overwrite,
    Shape,
    Trust,
    installed_plugins,
)
from mergekit_ot.cli.terminal import working


@takes_options("check")
def check(
    model: Model,
    arch: Arch = None,
    trust: Trust = None,
    input_shape: Shape = None,
    data: Data = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random orders.")] = 0,
    *,
    chosen: dict[str, Any],
    as_json: Json = False,
) -> None:
    """Reorder every neuron group at random: does the function stay? Lists what is pinned, and why."""
    with working():
        from mergekit_ot.jobs.looking import Subject, run_check

        subject = Subject(model, tuple(arch or ()), input_shape, data, trust=tuple(trust or ()), **chosen)
        report = run_check(subject, seed, installed_plugins(), output.note)
    output.show_check(report, as_json=as_json)


@takes_options("inspect")
def inspect(
    model: Model,
    arch: Arch = None,
    trust: Trust = None,
    input_shape: Shape = None,
    data: Data = None,
    dot: Annotated[Path | None, typer.Option("--dot", metavar="FILE", help="Write the graph for Graphviz.")] = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw the neuron groups as SVG.")] = None,
    modules: Annotated[
        Path | None, typer.Option("--modules", metavar="FILE", help="Draw the modules and what flows between, as SVG.")
    ] = None,
    *,
    chosen: dict[str, Any],
    overwrite: Overwrite = None,
    as_json: Json = False,
) -> None:
    """Show which parameter axes share one neuron order: the groups of the traced graph."""
    with working():
        from mergekit_ot.jobs.looking import Subject, run_inspect

        subject = Subject(model, tuple(arch or ()), input_shape, data, trust=tuple(trust or ()), **chosen)
        pictures = {"dot": dot, "svg": svg, "modules": modules}
        graph, held = run_inspect(subject, pictures, installed_plugins(), output.note, overwrite=bool(overwrite))
    output.show_graph(graph, held, as_json=as_json)


@takes_options("eval", device="cpu")
def evaluate(
    models: Models,
    data: Annotated[
        str, typer.Option("--data", metavar="SPEC", show_default=False, help="Test data; see fuse --help.")
    ],
    arch: Arch = None,
    trust: Trust = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metric", metavar="SPEC", help="Also measure file.py:function(outputs, targets), or a torchmetrics class."
        ),
    ] = None,
    top: Annotated[
        int | None, typer.Option("--top", min=2, metavar="K", help="Also count targets among the K likeliest classes.")
    ] = None,
    *,
    chosen: dict[str, Any],
    as_json: Json = False,
) -> None:
    """Score checkpoints on data: loss, accuracy in percent, perplexity of tokens, and metrics of yours, in one pass."""
    with working() as step:
        from mergekit_ot.jobs.looking import Scoring, run_eval
        from mergekit_ot.storage.file_options import FileOptions

        device = chosen.pop("device") or "cpu"
        keys = {name: chosen.pop(name) for name in ("input_key", "label_key")}
        scoring = Scoring(metrics=tuple(metrics or ()), top=top, **keys)
        files = FileOptions(**chosen)
        scores = run_eval(
            models, arch or (), data, device, installed_plugins(), output.note, trust or (), files, scoring, step
        )
    output.show_scores(models, scores, as_json=as_json)


def plugins(
    options: Annotated[
        bool, typer.Option("--options", help="List the options of every solver and repair, with their defaults.")
    ] = False,
    as_json: Json = False,
) -> None:
    """List the installed plugins, and the solvers, measures, repairs, rules, networks and data that they bring."""
    if not options:
        output.show_plugins(installed_plugins(), as_json=as_json)
        return
    with working():
        from mergekit_ot.hooks.methods import options_of_methods

        table = options_of_methods(installed_plugins())
    output.show_options(table, as_json=as_json)
