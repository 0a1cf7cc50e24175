"""The command ``mergeot``: parse, call one function, print."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from mergekit_ot.cli import output
from mergekit_ot.cli.barrier import barrier
from mergekit_ot.cli.cache import cache
from mergekit_ot.cli.docs import docs
from mergekit_ot.cli.flags import takes_options
from mergekit_ot.cli.interrupting import Stop, stopping
from mergekit_ot.cli.looking import check, evaluate, inspect, plugins
from mergekit_ot.cli.options import (
    Arch,
    Data,
    Json,
    Overwrite,
    Shape,
    Target,
    Trust,
    installed_plugins,
    parse_target,
)
from mergekit_ot.cli.terminal import working
from mergekit_ot.errors import MergeotError
from mergekit_ot.text import printable

if TYPE_CHECKING:
    from mergekit_ot.hooks.manager import PluginManager

# Typer shows the class of all errors of usage by its children only.
_UsageError: Any = typer.BadParameter.__base__


@takes_options("fuse")
def fuse(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="A.pt B.pt …", show_default=False, help="The source models, in order.")
    ] = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="The fused model; a folder for folders. Default: fused.pt."
        ),
    ] = None,
    arch: Arch = None,
    trust: Trust = None,
    input_shape: Shape = None,
    target: Target = None,
    data: Data = None,
    *,
    chosen: dict[str, Any],
    recipe: Annotated[
        Path | None, typer.Option("--recipe", metavar="FILE", help="The same flags as YAML; flags here override it.")
    ] = None,
    report: Annotated[
        str | None,
        typer.Option("--report", metavar="DIR", help="Write a report there: report.html, its numbers, the recipe."),
    ] = None,
    save_recipe: Annotated[
        Path | None,
        typer.Option(
            "--save-recipe", metavar="FILE", help="Write all that was asked for as a --recipe that repeats it."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; compute and write nothing.")] = False,
    overwrite: Overwrite = None,
    as_json: Json = False,
) -> None:
    """Fuse two or more networks into one, by aligning their neurons first.

    Checkpoints written by mergeot carry their architecture; others need --arch. The sources may differ in width, and
    with --target SPEC the fused network has sizes of its own (one source alone is then compressed or widened).
    """
    if not models and recipe is None:
        raise typer.BadParameter("name at least two checkpoints, or a --recipe", param_hint="A.pt B.pt …")
    with working() as step:
        from mergekit_ot.jobs.fusing import run_fuse
        from mergekit_ot.recipe import make_recipe

        places = {
            "models": models,
            "output": to,
            "arch": arch,
            "trust": trust,
            "input_shape": input_shape,
            "data": data,
        }
        written = {"report": report, "overwrite": overwrite}
        asked = make_recipe(recipe, output.note, **places, target=parse_target(target), **written, **chosen)
        files = {"recipe_file": recipe, "save_recipe": save_recipe}
        outcome = run_fuse(asked, installed_plugins(), output.note, step, dry_run=dry_run, **files)
    output.show_fusion(outcome, as_json=as_json)


@takes_options("align", solver="weight-matching")
def align(
    reference: Annotated[str, typer.Argument(metavar="REF.pt", show_default=False, help="Whose neuron order counts.")],
    others: Annotated[list[str], typer.Argument(metavar="OTHER.pt…", show_default=False, help="What is reordered.")],
    to: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", show_default=False, help="Folder to write to.")],
    arch: Arch = None,
    trust: Trust = None,
    input_shape: Shape = None,
    data: Data = None,
    *,
    chosen: dict[str, Any],
    overwrite: Overwrite = None,
    as_json: Json = False,
) -> None:
    """Write models in another one's neuron order: the same functions, for any other merging tool."""
    with working() as step:
        from mergekit_ot.jobs.aligning import run_align
        from mergekit_ot.recipe import make_recipe

        models = [reference, *others]
        places = {"arch": arch, "trust": trust, "input_shape": input_shape, "data": data, "overwrite": overwrite}
        recipe = make_recipe(models=models, **places, **chosen)
        written = run_align(recipe, to, installed_plugins(), output.note, step)
    output.show_aligned(reference, recipe.solver, written, as_json=as_json)


_FUSING, _LOOKING, _SCORING, _LEARNING = "Fuse", "Look at networks", "Measure", "Learn and set up"
_COMMANDS = (
    (fuse, _FUSING, "mergeot fuse a.pt b.pt -o fused.pt --solver wb --arch nets.py:mlp --input-shape 1,28,28"),
    (align, _FUSING, "mergeot align a.pt b.pt -o aligned --arch nets.py:mlp"),
    (check, _LOOKING, "mergeot check a.pt --arch nets.py:mlp"),
    (inspect, _LOOKING, "mergeot inspect a.pt --arch nets.py:mlp --svg groups.svg"),
    (evaluate, _SCORING, "mergeot eval a.pt b.pt --arch nets.py:mlp --data 'mnist.npz?mean=0.1307&std=0.3081'"),
    (barrier, _SCORING, "mergeot barrier a.pt b.pt --arch nets.py:mlp --data mnist.npz --align wb --plot curve.png"),
    (plugins, _LEARNING, "mergeot plugins --options"),
    (docs, _LEARNING, "mergeot docs solvers"),
    (cache, _LEARNING, "mergeot cache --clear"),
)
_NAMES = {evaluate: "eval"}
_OTHERS = "From plugins"


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


class _Program(TyperGroup):
    """The program's commands; what an error of usage says holds what was typed, or the names of files."""

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        """Reads the program's own arguments."""
        with _readable_usage():
            return super().make_context(*arguments, **settings)

    def invoke(self, ctx: Any) -> Any:
        """Reads a command's arguments and runs it."""
        with _readable_usage():
            return super().invoke(ctx)


@contextlib.contextmanager
def _readable_usage() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        error.message = printable(error.message)
        raise


def build_app(manager: PluginManager) -> typer.Typer:
    """Returns the command line with its own commands and those of the plugins."""
    app = typer.Typer(
        name="mergeot",
        cls=_Program,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        epilog=_examples(),
    )
    app.callback()(_root)
    for function, panel, example in _COMMANDS:
        name = _NAMES.get(function, function.__name__)
        app.command(name, epilog=f"Example: {example}", rich_help_panel=panel)(function)
    manager.add_commands(app)
    for added in (*app.registered_commands, *app.registered_groups):
        # What a plugin says nothing of has a place of its own.
        if not isinstance(added.rich_help_panel, str):
            added.rich_help_panel = _OTHERS
    return app


def _examples() -> str:
    """Returns what stands below the list of commands: one example of each."""
    first = "Start here: mergeot demo. Data of every kind: mergeot docs data. One example of each command:"
    return "\n\n".join([first, *(f"  {example}" for _, _, example in _COMMANDS)])


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and ends the process: 0 done, 1 an error of the input, 2 wrong usage, 130 on Ctrl-C."""
    with stopping() as stop:
        try:
            status = _run(arguments, stop)
        except BaseException:
            if stop.signal is None:
                raise
        # Whatever a library made of it: the user asked to end.
        if stop.signal is not None:
            stop.tell()
            status = stop.status
    sys.exit(status)


def _run(arguments: Sequence[str] | None, stop: Stop) -> int:
    """Runs the command line and returns the exit status."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = output.show_warning
            app = build_app(installed_plugins())
            app(args=None if arguments is None else list(arguments), prog_name="mergeot")
    except Exception as error:
        # What an interrupt makes libraries raise is no error.
        if stop.signal is None:
            report = output.report_error if isinstance(error, MergeotError) else output.report_bug
            report(error)
        return 1
    return 0


if __name__ == "__main__":
    main()
