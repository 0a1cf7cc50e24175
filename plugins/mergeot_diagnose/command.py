"""What ``mergeot diagnose`` takes: files, their architecture, data. It reads, looks, prints, and draws."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from mergekit_ot import ReadSource
    from mergeot_diagnose.findings import Diagnosis


def diagnose_files(
    models: Annotated[list[str], typer.Argument(metavar="A.pt B.pt …", show_default=False, help="The networks.")],
    arch: Annotated[
        list[str] | None,
        typer.Option("--arch", metavar="SPEC", help="Architecture, as for 'fuse'; once for all, or once each."),
    ] = None,
    trust: Annotated[
        list[str] | None,
        typer.Option("--trust", metavar="FILE", help="A checkpoint whose program (.pt2) may run; repeatable."),
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option("--input-shape", metavar="1,28,28", help="Shape of one input, without the batch axis."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="SPEC", help="Data to compare them on, as for 'fuse'.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", min=2, metavar="N", help="Samples of --data at most.")] = 500,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the random orders to compare with.")] = 0,
    figure: Annotated[Path | None, typer.Option("--figure", metavar="FILE", help="Draw it (.svg, .png, .pdf).")] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Also replace files that mergeot did not write; never an input.")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object on standard output, and nothing else.")
    ] = False,
) -> None:
    """Look at networks before you fuse them: one basin or not, how similar their layers are, and what is advised."""
    shape = _shape(input_shape)
    with contextlib.redirect_stdout(sys.stderr):
        from mergekit_ot import check_output, check_picture_path
        from mergeot_diagnose.showing import show

        if figure is not None:
            check_picture_path(figure)
            check_output(figure, models, overwrite=overwrite)
        found = _looked_at(models, arch or [], trust or [], shape, data, samples, seed)
        command = shlex.join(_next_command(found, models, arch or [], input_shape, data))
        if figure is not None:
            from mergeot_diagnose.picture import plot_diagnosis

            plot_diagnosis(found, figure, overwrite=overwrite)
    if as_json:
        print(json.dumps({**found.as_json(), "command": command}, default=str))
        return
    show(found, command)


def _shape(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not all(part.strip().isdecimal() and int(part) > 0 for part in text.split(",")):
        raise typer.BadParameter(f"'{text}' is not a shape such as 1,28,28", param_hint="--input-shape")
    return tuple(int(part) for part in text.split(","))


def _looked_at(
    models: Sequence[str],
    arch: Sequence[str],
    trust: Sequence[str],
    shape: tuple[int, ...] | None,
    data: str | None,
    samples: int,
    seed: int,
) -> Diagnosis:
    """Reads the networks and the data, and returns the diagnosis."""
    from mergekit_ot import RecipeError, default_manager, example_inputs_of, read_sources, resolve_data
    from mergeot_diagnose.diagnosis import diagnose

    if len(models) < 2:
        raise RecipeError("A diagnosis compares networks: name two or more files.")
    manager = default_manager()
    sources = read_sources(models, arch, manager, _note, trust)
    given = None if data is None else resolve_data(data, manager)
    inputs = None if given is not None else example_inputs_of(sources[0], shape, None, _note)[0]
    return diagnose(
        [_source_model(source) for source in sources],
        example_inputs=inputs,
        data=given,
        most_samples=samples,
        seed=seed,
        manager=manager,
    )


def _source_model(source: ReadSource) -> Any:
    from mergekit_ot import SourceModel

    return SourceModel(source.name, source.known, source.state)


def _next_command(
    found: Diagnosis, models: Sequence[str], arch: Sequence[str], input_shape: str | None, data: str | None
) -> list[str]:
    """Returns the fusion that is advised, word by word."""
    advice = found.advice
    words = ["mergeot", "fuse", *models]
    for spec in arch:
        words += ["--arch", spec]
    words += [] if input_shape is None else ["--input-shape", input_shape]
    # An average needs no data, and what reads no network does without them.
    is_read = data is not None and (advice.repair != "none" or advice.solver == "activation-matching")
    words += ["--data", str(data)] if is_read else []
    return [*words, *advice.flags, "-o", "fused.pt"]


def _note(text: str) -> None:
    from mergekit_ot import printable

    print(printable(text), file=sys.stderr, flush=True)
