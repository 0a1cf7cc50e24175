"""The command ``mergeot``: parse, call one function, print."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergekit_ot.cli import output
from mergekit_ot.cli.barrier import barrier
from mergekit_ot.cli.options import (
    Arch,
    Data,
    Device,
    FrontEnd,
    Json,
    Measure,
    Model,
    Models,
    Refine,
    Repair,
    Restarts,
    Seed,
    Shape,
    Size,
    Solver,
    SolverOption,
    Target,
    TraceSeconds,
    installed_plugins,
    parse_options,
    parse_target,
    parse_weights,
)
from mergekit_ot.errors import MergeotError

if TYPE_CHECKING:
    from mergekit_ot.hooks.manager import PluginManager


def fuse(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="A.pt B.pt …", show_default=False, help="The source models, in order.")
    ] = None,
    to: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="The fused model. Default: fused.pt.")
    ] = None,
    solver: Solver = None,
    solver_option: SolverOption = None,
    arch: Arch = None,
    input_shape: Shape = None,
    measure: Measure = None,
    model_weights: Annotated[
        Any,
        typer.Option(
            "--model-weights",
            metavar="0.5,0.5",
            parser=parse_weights,
            help="One per model, summing to one. Default: equal.",
        ),
    ] = None,
    target: Target = None,
    data: Data = None,
    calibration_size: Size = None,
    repair: Repair = None,
    device: Device = None,
    seed: Seed = None,
    refine: Refine = None,
    restarts: Restarts = None,
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="The same flags as YAML; flags here override it.")
    ] = None,
    front_end: FrontEnd = None,
    trace_seconds: TraceSeconds = None,
    report: Annotated[
        str | None,
        typer.Option("--report", metavar="DIR", help="Write a report there: report.html, its numbers, the recipe."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; compute and write nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Fuse two or more networks into one, by aligning their neurons first.

    Checkpoints written by mergeot carry their architecture; others need --arch. The sources may differ in width, and
    with --target SPEC the fused network has sizes of its own (one source alone is then compressed or widened).
    """
    if not models and recipe is None:
        raise typer.BadParameter("name at least two checkpoints, or a --recipe", param_hint="A.pt B.pt …")
    options = parse_options(solver_option)
    with output.working(), output.StepLine() as step:
        from mergekit_ot.jobs.fusing import run_fuse
        from mergekit_ot.recipe import make_recipe

        made = make_recipe(
            recipe, models=models, output=to, solver=solver, solver_options=options, arch=arch, input_shape=input_shape,
            measure=measure, model_weights=model_weights, target=parse_target(target), data=data,
            calibration_size=calibration_size, repair=repair, refine=refine, restarts=restarts, device=device,
            seed=seed, report=report, front_end=front_end, trace_seconds=trace_seconds,
        )  # fmt: skip
        outcome = run_fuse(made, installed_plugins(), output.note, step, dry_run=dry_run)
    output.show_fusion(outcome, as_json=as_json)


def align(
    reference: Annotated[str, typer.Argument(metavar="REF.pt", show_default=False, help="Whose neuron order counts.")],
    others: Annotated[list[str], typer.Argument(metavar="OTHER.pt…", show_default=False, help="What is reordered.")],
    to: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", show_default=False, help="Folder to write to.")],
    solver: Solver = "weight-matching",
    solver_option: SolverOption = None,
    arch: Arch = None,
    input_shape: Shape = None,
    measure: Measure = None,
    data: Data = None,
    calibration_size: Size = None,
    device: Device = None,
    seed: Seed = None,
    front_end: FrontEnd = None,
    trace_seconds: TraceSeconds = None,
    as_json: Json = False,
) -> None:
    """Write models in another one's neuron order: the same functions, for any other merging tool."""
    options = parse_options(solver_option)
    with output.working(), output.StepLine() as step:
        from mergekit_ot.jobs.aligning import run_align
        from mergekit_ot.recipe import make_recipe

        recipe = make_recipe(
            models=[reference, *others], solver=solver, solver_options=options, arch=arch, input_shape=input_shape,
            measure=measure, data=data, calibration_size=calibration_size, device=device, seed=seed,
            front_end=front_end, trace_seconds=trace_seconds,
        )  # fmt: skip
        written = run_align(recipe, to, installed_plugins(), output.note, step)
    output.show_aligned(reference, recipe.solver, written, as_json=as_json)


def check(
    model: Model,
    arch: Arch = None,
    input_shape: Shape = None,
    data: Data = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random orders.")] = 0,
    front_end: FrontEnd = None,
    trace_seconds: TraceSeconds = None,
    as_json: Json = False,
) -> None:
    """Reorder every neuron group at random: does the function stay? Lists what is pinned, and why."""
    with output.working():
        from mergekit_ot.jobs.looking import make_tracing, run_check

        tracing = make_tracing(front_end, trace_seconds)
        report = run_check(model, arch or (), input_shape, data, seed, tracing, installed_plugins(), output.note)
    output.show_check(report, as_json=as_json)


def inspect(
    model: Model,
    arch: Arch = None,
    input_shape: Shape = None,
    data: Data = None,
    dot: Annotated[Path | None, typer.Option("--dot", metavar="FILE", help="Write the graph for Graphviz.")] = None,
    svg: Annotated[Path | None, typer.Option("--svg", metavar="FILE", help="Draw the neuron groups as SVG.")] = None,
    modules: Annotated[
        Path | None, typer.Option("--modules", metavar="FILE", help="Draw the modules and what flows between, as SVG.")
    ] = None,
    front_end: FrontEnd = None,
    trace_seconds: TraceSeconds = None,
    as_json: Json = False,
) -> None:
    """Show which parameter axes share one neuron order: the groups of the traced graph."""
    with output.working():
        from mergekit_ot.jobs.looking import make_tracing, run_inspect

        tracing = make_tracing(front_end, trace_seconds)
        pictures = {"dot": dot, "svg": svg, "modules": modules}
        graph = run_inspect(model, arch or (), input_shape, data, tracing, installed_plugins(), output.note, pictures)
    output.show_graph(graph, as_json=as_json)


def evaluate(
    models: Models,
    data: Annotated[
        str, typer.Option("--data", metavar="SPEC", show_default=False, help="Test data; see fuse --help.")
    ],
    arch: Arch = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Score checkpoints on data: mean loss and accuracy in percent, all in one pass."""
    with output.working():
        from mergekit_ot.jobs.looking import run_eval

        scores = run_eval(models, arch or (), data, device or "cpu", installed_plugins(), output.note)
    output.show_scores(models, scores, as_json=as_json)


def plugins(as_json: Json = False) -> None:
    """List the installed plugins, and the solvers, measures, repairs, rules, networks and data that they bring."""
    output.show_plugins(installed_plugins(), as_json=as_json)


_COMMANDS = (
    (fuse, "fuse", "mergeot fuse a.pt b.pt -o fused.pt --solver wb --arch nets.py:mlp --input-shape 1,28,28"),
    (align, "align", "mergeot align a.pt b.pt -o aligned --arch nets.py:mlp"),
    (check, "check", "mergeot check a.pt --arch nets.py:mlp"),
    (inspect, "inspect", "mergeot inspect a.pt --arch nets.py:mlp --svg groups.svg"),
    (evaluate, "eval", "mergeot eval a.pt b.pt --arch nets.py:mlp --data 'mnist.npz?mean=0.1307&std=0.3081'"),
    (barrier, "barrier", "mergeot barrier a.pt b.pt --arch nets.py:mlp --data mnist.npz --align wb --plot curve.png"),
    (plugins, "plugins", "mergeot plugins --json"),
)  # fmt: skip


def _show_version(is_wanted: bool) -> None:
    if is_wanted:
        from mergekit_ot import __version__

        print(f"mergeot {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """Fuse neural networks that were trained independently, by optimal transport."""


def build_app(manager: PluginManager) -> typer.Typer:
    """Returns the command line with its own commands and those of the plugins."""
    app = typer.Typer(
        name="mergeot", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
        epilog="Start here: mergeot demo. Every command has an example in its --help.",
    )  # fmt: skip
    app.callback()(_root)
    for function, name, example in _COMMANDS:
        app.command(name, epilog=f"Example: {example}")(function)
    manager.hook.mergeot_commands(app=app)
    return app


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and ends the process: 0 done, 1 an error of the input, 2 wrong usage."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = output.show_warning
            app = build_app(installed_plugins())
            app(args=None if arguments is None else list(arguments), prog_name="mergeot")
    except MergeotError as error:
        output.report_error(error)
        sys.exit(1)
    except Exception as error:
        output.report_bug(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
