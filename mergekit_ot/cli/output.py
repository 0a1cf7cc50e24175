"""What the commands print: one JSON object on standard output, or tables on standard error."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_ot.cli.tables import show_table, shown
from mergekit_ot.cli.terminal import note
from mergekit_ot.storage.files import plain
from mergekit_ot.text import printable

_NOT_TRACED = "No neuron group was looked for: an average needs none. 'mergeot inspect' shows them."


def show_path(path: object) -> None:
    """Prints the name of a written file on standard output: as it is for programs, readable on a terminal."""
    name = str(path)
    if sys.stdout.isatty():
        print(printable(name), flush=True)
        return
    try:
        print(name, flush=True)
    except UnicodeEncodeError:  # a name need not be text
        sys.stdout.buffer.write(os.fsencode(name) + b"\n")
        sys.stdout.flush()


def warn(texts: Sequence[str]) -> None:
    """Prints warnings on standard error."""
    for text in texts:
        note(f"warning: {text}")


def show_warning(message: object, *_: object, **__: object) -> None:
    """Prints a Python warning as one line, without the place in the code it comes from."""
    note(f"warning: {message}")


def show_json(value: Mapping[str, Any]) -> None:
    """Prints one JSON object; numbers that JSON cannot hold become null."""
    print(json.dumps(plain(dict(value)), allow_nan=False), flush=True)


def report_error(error: BaseException) -> None:
    """Prints one message for an error of the user's input; with ``MERGEOT_DEBUG=1``, also what led to it."""
    if os.environ.get("MERGEOT_DEBUG") == "1" and error.__cause__ is not None:
        _show_traceback(error.__cause__)
    note(f"mergeot: error: {error}")


def report_bug(error: BaseException) -> None:
    """Prints a short message for an error that nobody foresaw; the traceback with ``MERGEOT_DEBUG=1``."""
    if os.environ.get("MERGEOT_DEBUG") == "1":
        _show_traceback(error)
        return
    first = str(error).splitlines()[0] if str(error) else "no message"
    note(f"mergeot: internal error: {type(error).__name__}: {first}")
    note(
        "This is a mistake in mergeot or in a plugin. Run the same command with MERGEOT_DEBUG=1 for the traceback, and "
        "please report it together with the command."
    )


def _show_traceback(error: BaseException) -> None:
    for line in "".join(traceback.format_exception(error)).splitlines():
        note(line)


def show_fusion(outcome: Any, *, as_json: bool) -> None:
    """Prints the outcome of ``mergeot fuse``."""
    content = outcome.as_json()
    warn(outcome.result.warnings)
    if as_json:
        show_json(content)
        return
    if outcome.output is None:
        show_table(content["plan"], title="Plan (dry run: nothing was computed or written)")
        note(f"It would come to this: {outcome.result.extent.sentence}")
        return
    is_traced = outcome.result.is_traced
    if is_traced:
        show_table(content["groups"], ("name", "size", "cost", "status", "solver"), title="Neuron groups")
    for when, objective in outcome.result.objectives.items():
        note(f"Objective of the whole alignment, {when}: {objective:.6g}.")
    note(outcome.result.check.sentence)
    for text in outcome.result.notes:
        note(text)
    comparison = outcome.result.repair_comparison
    if comparison is not None and not comparison.warnings:
        note(comparison.sentence)
    note(outcome.result.extent.sentence if is_traced else _NOT_TRACED)
    note(f"Fused with {outcome.solver} in {content['seconds']:.2f} s. Written:")
    show_path(outcome.output)


def show_aligned(reference: str, solver: str, written: Sequence[Any], *, as_json: bool) -> None:
    """Prints what ``mergeot align`` wrote."""
    if as_json:
        show_json({"reference": reference, "solver": solver, "outputs": [each.as_json() for each in written]})
        return
    rows = [{"source": w.source, "path": w.path, "max_error": w.max_error, "seconds": w.seconds} for w in written]
    show_table(rows, title=f"In the neuron order of {reference} (solver {solver})")
    for each in written:
        name = "" if len(written) == 1 else f"{each.source}: "
        note(f"{name}{each.sentence}")
        note(f"{name}{each.extent.sentence}")
    for row in rows:
        show_path(row["path"])


def show_check(report: Any, *, as_json: bool) -> None:
    """Prints the counts of ``mergeot check``, its table, and why axes are pinned."""
    names = ("groups", "families", "certified", "pinned", "max_error", "preserved")
    warn(report.warnings)
    symmetries = {name: len(places) for name, places in report.symmetries.items()}
    if as_json:
        counts = {name: getattr(report, name) for name in names}
        told = {"refusals": list(report.refusals), **({"untied": list(report.untied)} if report.untied else {})}
        show_json({**counts, "symmetries": symmetries, **told})
        return
    if report.rows:
        rows = [{**row, "symmetries": ", ".join(row["symmetries"])} for row in report.rows]
        show_table(rows, title="Neuron groups")
    for pin in report.pins:
        note(f"pinned: {pin}")
    if report.preserved is None:
        note("Nothing found: no neuron group is free, so nothing was tested.")
        return
    verdict = "stays" if report.preserved else "CHANGES"
    note(
        f"{report.groups} groups ({report.families} independent orders), {report.certified} certified, {report.pinned} "
        f"pinned. Reordered at random, the function {verdict} (largest error {shown(report.max_error)})."
    )
    for refusal in report.refusals:
        note(f"not in normal form: {refusal}")
    for sentence in report.untied:
        note(f"tied: {sentence}")
    held = [f"{name} ({count} of {report.groups} groups)" for name, count in symmetries.items() if count]
    note(f"Symmetries: {', '.join(held) or 'none'}.")


def show_graph(graph: Any, held: Mapping[str, Sequence[str]], *, as_json: bool) -> None:
    """Prints the groups of a traced graph, and what they allow besides another order."""
    from mergekit_ot.pictures.dot import group_rows

    rows = [{**row, "symmetries": list(held.get(row["name"], ()))} for row in group_rows(graph)]
    warn(graph.diagnostics.sentences)
    if as_json:
        show_json({"groups": rows, "diagnostics": list(graph.diagnostics.sentences)})
    elif rows:
        told = [row for row in rows if row["why"] is None or row["symmetries"]]
        free = [{**row, "members": _few(row["members"]), "symmetries": ", ".join(row["symmetries"])} for row in told]
        columns = ("name", "size", "orders", "members", "flags")
        if free:
            show_table(free, (*columns, "symmetries") if held else columns, title="Neuron groups")
        else:
            note("Nothing found: no neuron group is free.")
        for sentence in graph.pin_sentences():
            note(f"pinned: {sentence}")
    else:
        note("Nothing found: the graph has no neuron group.")


def _few(members: Sequence[str]) -> str:
    return ", ".join(members[:3]) + (f" and {len(members) - 3} more" if len(members) > 3 else "")


def show_scores(paths: Sequence[str], scores: Sequence[Any], *, as_json: bool) -> None:
    """Prints what ``mergeot eval`` measured."""
    rows = [{"path": path, **score.as_json()} for path, score in zip(paths, scores, strict=True)]
    if as_json:
        show_json({"models": rows})
        return
    show_table([{**row, "accuracy": percent(row["accuracy"])} for row in rows], tuple(rows[0]))


def percent(value: float | None) -> str | None:
    """Returns an accuracy with two decimals."""
    return None if value is None else f"{value:.2f} %"


def show_barrier(connectivity: Any, pictures: Sequence[object], *, as_json: bool) -> None:
    """Prints the paths between two models: as they are, aligned, repaired."""
    if as_json:
        show_json(connectivity.as_json())
        return
    curves = connectivity.curves()
    rows = [
        {"t": f"{t:.2f}", **{label: _scores_at(curve, index) for label, curve in curves.items()}}
        for index, t in enumerate(connectivity.naive["t"])
    ]
    title = "Loss and accuracy on the path" if connectivity.naive["accuracy"] is not None else "Loss on the path"
    if "perplexity" in connectivity.naive:
        title = "Loss, accuracy and perplexity on the path"
    show_table(rows, title=title)
    for label, curve in curves.items():
        height = "" if curve["error_barrier"] is None else f", error barrier {curve['error_barrier']:.2f} points"
        note(f"{label}: loss barrier {shown(curve['loss_barrier'])}{height}")
    for path in pictures:
        show_path(path)


def _scores_at(curve: Any, index: int) -> str:
    scores = shown(curve["loss"][index])
    if curve["accuracy"] is not None:
        scores = f"{scores:>9}  {percent(curve['accuracy'][index]):>8}"
    return f"{scores}  {shown(curve['perplexity'][index]):>8}" if "perplexity" in curve else scores


def show_options(table: Mapping[str, Any], *, as_json: bool) -> None:
    """Prints the options that methods take: kind → name → options."""
    if as_json:
        show_json({"options": table})
        return
    for kind, methods in table.items():
        rows = [{"name": name, **option} for name, options in methods.items() for option in options]
        show_table(rows, ("name", "option", "default", "value"), title=f"Options of {kind}")
    note("A solver takes --solver-option OPTION=VALUE, a repair --repair-option OPTION=VALUE.")


def show_plugins(manager: Any, *, as_json: bool) -> None:
    """Prints the installed plugins and what they register, without importing it."""
    kinds = {
        "solvers": manager.solvers,
        "measures": manager.node_measures,
        "repairs": manager.repairs,
        "executors": manager.executors,
        "architectures": manager.architectures,
        "libraries": manager.libraries,
        "guesses": manager.guesses,
        "datasets": manager.datasets,
        "rules": manager.node_rules,
        "symmetries": manager.symmetries,
    }
    rows = [
        {"name": row.name, "version": row.version, "distribution": row.distribution, "hooks": list(row.hooks)}
        for row in manager.describe()
    ]
    if as_json:
        show_json({"plugins": rows, **{kind: sorted(table) for kind, table in kinds.items()}, "broken": manager.broken})
        return
    show_table([{**row, "hooks": [hook.removeprefix("mergeot_") for hook in row["hooks"]]} for row in rows])
    for kind, table in kinds.items():
        names = sorted(table)
        listing = f"{len(names)} operations" if kind == "rules" else ", ".join(names) or "none"
        note(f"{kind}: {listing}")
