"""The command ``mergeot barrier``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mergekit_ot.cli import output
from mergekit_ot.cli.flags import names_of, takes_options
from mergekit_ot.cli.options import Arch, Json, Overwrite, Shape, Trust, installed_plugins
from mergekit_ot.cli.terminal import working


@takes_options("barrier", device="cpu")
def barrier(
    model_a: Annotated[str, typer.Argument(metavar="A.pt", show_default=False, help="The model at t = 0.")],
    model_b: Annotated[str, typer.Argument(metavar="B.pt", show_default=False, help="The model at t = 1.")],
    data: Annotated[str, typer.Option("--data", metavar="SPEC", show_default=False, help="Data to measure on.")],
    arch: Arch = None,
    trust: Trust = None,
    solver: Annotated[
        str | None,
        typer.Option(
            "--align",
            metavar="SOLVER",
            help="Also measure it after aligning B to A.",
            autocompletion=names_of("solver"),
        ),
    ] = None,
    points: Annotated[int, typer.Option("--points", min=2, help="Points on the path, both ends included.")] = 25,
    repair: Annotated[
        str | None,
        typer.Option(
            "--repair",
            metavar="NAME",
            help="Also measure the paths with this repair at every point between the ends.",
            autocompletion=names_of("repair"),
        ),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Draw the curves (.png, .pdf, .svg).")
    ] = None,
    plane: Annotated[
        Path | None,
        typer.Option(
            "--plane", metavar="FILE", help="Draw the loss landscape on the plane through A, B and aligned B."
        ),
    ] = None,
    plane_points: Annotated[
        int, typer.Option("--plane-points", min=2, metavar="N", help="Evaluate the plane at N × N points.")
    ] = 21,
    input_shape: Shape = None,
    *,
    chosen: dict[str, Any],
    overwrite: Overwrite = None,
    as_json: Json = False,
) -> None:
    """Measure the loss and error barrier on the straight path between two models, and draw the plane around it."""
    with working() as step:
        from mergekit_ot.jobs.connecting import run_barrier
        from mergekit_ot.jobs.connectivity import Pictures
        from mergekit_ot.recipe import make_recipe

        places = {"arch": arch, "trust": trust, "input_shape": input_shape, "data": data, "overwrite": overwrite}
        recipe = make_recipe(models=[model_a, model_b], solver=solver, repair=repair, **places, **chosen)
        pictures = Pictures(plot, plane, plane_points)
        connectivity = run_barrier(
            recipe, points, installed_plugins(), output.note, step, align=solver is not None, pictures=pictures
        )
    output.show_barrier(connectivity, pictures.paths, as_json=as_json)
