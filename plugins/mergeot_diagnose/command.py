"""What ``mergeot diagnose`` takes: files, their architecture, data. It reads, looks, prints, and draws."""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from mergekit_ot import ModelFiles
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
    state_key: Annotated[
        str | None, typer.Option("--state-key", metavar="KEY", help="Which state dict in the files is meant.")
    ] = None,
    strip_prefix: Annotated[
        str | None, typer.Option("--strip-prefix", metavar="PREFIX", help="What to take off the names in the files.")
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option("--ignore", metavar="GLOB", help="Names in the files that are no weights; repeatable."),
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
        from mergekit_ot import ModelFiles, check_output, check_picture_path
        from mergeot_diagnose.showing import show

        if figure is not None:
            check_picture_path(figure)
            check_output(figure, models, overwrite=overwrite)
        named = {"paths": tuple(models), "arch": tuple(arch or ()), "trust": tuple(trust or ()), "data": data}
        read = {"state_key": state_key, "strip_prefix": strip_prefix, "ignore": tuple(ignore or ())}
        files = ModelFiles(**named, **read, input_shape=shape)
        found = _looked_at(files, samples, seed)
        command = shlex.join(_next_command(found, files))
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


def _looked_at(files: ModelFiles, samples: int, seed: int) -> Diagnosis:
    """Reads the networks and the data, and returns the diagnosis."""
    from mergekit_ot import RecipeError, default_manager
    from mergeot_diagnose.diagnosis import diagnose

    if len(files.paths) < 2:
        raise RecipeError("A diagnosis compares networks: name two or more files.")
    manager = default_manager()
    opened = files.open("'mergeot diagnose --data'", manager, _note)
    given = {"example_inputs": opened.inputs, "data": opened.data, "most_samples": samples}
    return diagnose(opened.models, **given, seed=seed, manager=manager, notify=_note)


def _next_command(found: Diagnosis, files: ModelFiles) -> list[str]:
    """Returns the fusion that is advised, word by word."""
    advice = found.advice
    # An average needs no data, and what reads no network does without them.
    is_read = advice.repair != "none" or advice.solver == "activation-matching"
    given = {
        "--arch": files.arch,
        "--trust": files.trust,
        "--input-shape": () if files.input_shape is None else (",".join(map(str, files.input_shape)),),
        "--state-key": () if files.state_key is None else (files.state_key,),
        "--strip-prefix": () if files.strip_prefix is None else (files.strip_prefix,),
        "--ignore": files.ignore,
        "--data": (files.data,) if files.data is not None and is_read else (),
    }
    flags = [word for flag, values in given.items() for value in values for word in (flag, value)]
    return ["mergeot", "fuse", *files.paths, *flags, *advice.flags, "-o", "fused.pt"]


def _note(text: str) -> None:
    from mergekit_ot import printable

    print(printable(text), file=sys.stderr, flush=True)
