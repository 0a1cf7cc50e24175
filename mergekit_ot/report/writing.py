"""Write the report of a fusion: a page, a summary, plain data, and the recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.progress import Notify, Progress
from mergekit_ot.recipe import FusionRecipe
from mergekit_ot.report.facts import Report, collect_report
from mergekit_ot.report.groups_section import symmetry_sentence
from mergekit_ot.report.outcome import status_word
from mergekit_ot.report.page import report_page
from mergekit_ot.report.repeating import RECIPE_FILE
from mergekit_ot.report.scores import NO_DATA, Scores, score_fusion
from mergekit_ot.report.scores_section import number_text, percent, verdict
from mergekit_ot.sources.datasets import resolve_data
from mergekit_ot.sources.needs import needs_of
from mergekit_ot.sources.reading import ReadSource
from mergekit_ot.sources.specs import Architecture
from mergekit_ot.storage.files import json_text, made_folder, write_texts
from mergekit_ot.storage.marks import JSON_KEY, XML_COMMENT, YAML_COMMENT, with_mark
from mergekit_ot.text import as_markdown

if TYPE_CHECKING:
    from mergekit_ot.report.outcome import FusionOutcome

PAGE = "report.html"
SUMMARY = "report.md"
NUMBERS = "report.json"


def report_files(folder: Path) -> dict[str, Path]:
    """Returns the files of a report by name."""
    return {name: folder / name for name in (RECIPE_FILE, NUMBERS, SUMMARY, PAGE)}


def report_recipe(recipe: FusionRecipe) -> str:
    """Returns the recipe as it stands in a report."""
    return with_mark(replace(recipe, overwrite=False).to_yaml(), YAML_COMMENT)


def write_report(
    folder: Path,
    recipe: FusionRecipe,
    outcome: FusionOutcome,
    sources: Sequence[ReadSource],
    fused_as: Architecture,
    manager: PluginManager,
    notify: Notify,
    progress: Progress | None = None,
) -> None:
    """Writes ``report.html``, ``report.md``, ``report.json`` and ``recipe.yaml``; all as a whole or none.

    Args:
        folder: Where to; it is made.
        recipe: What was asked for.
        outcome: What came out; its model is saved already.
        sources: The checkpoints, in order.
        fused_as: Architecture of the fused model.
        manager: Whose data sets are known.
        notify: Told what is computed for the report.
        progress: Called with (points done, points in all, what is done).

    Raises:
        CheckpointError: The folder cannot be written.
    """
    with made_folder(folder):
        scores = Scores(missing=NO_DATA)
        if recipe.data is not None:
            spec = recipe.data
            scores = score_fusion(
                outcome.result,
                recipe.weights,
                lambda: resolve_data(spec, manager).for_network(*needs_of(sources, recipe, notify)),
                recipe.device,
                notify,
                progress,
            )
        # What was replaced is no part of the fusion, and whoever repeats it replaces what it wrote.
        report = collect_report(folder, replace(recipe, overwrite=False), outcome, sources, fused_as, scores)
        write_texts(_texts(folder, report, outcome), overwrite=recipe.overwrite)
    notify(f"Report: {folder / PAGE}")


def _texts(folder: Path, report: Report, outcome: FusionOutcome) -> dict[Path, str]:
    """Returns the files of a report; without the recipe where that is there as it is, perhaps to be read from."""
    from mergekit_ot import __version__

    numbers = {
        JSON_KEY: f"mergekit_ot {__version__}",
        **outcome.as_json(),
        "output": report.fused.name,
        **report.as_json(),
    }
    texts = {
        RECIPE_FILE: report_recipe(report.recipe),
        NUMBERS: json_text(numbers),
        SUMMARY: with_mark(report_summary(report), XML_COMMENT),
        PAGE: with_mark(report_page(report), XML_COMMENT),
    }
    recipe_file = folder / RECIPE_FILE
    if recipe_file.is_file() and recipe_file.read_bytes() == texts[RECIPE_FILE].encode():
        del texts[RECIPE_FILE]
    return {folder / name: text for name, text in texts.items()}


def report_summary(report: Report) -> str:
    """Returns the report in brief, as Markdown."""
    recipe = report.recipe
    shown = as_markdown
    lines = [f"# {shown(', '.join(recipe.models))} → {shown(report.fused.name)}", "", shown(verdict(report)), ""]
    lines.append(
        f"Solver {shown(recipe.solver)}, model weights {', '.join(f'{weight:g}' for weight in recipe.weights)}, "
        f"{report.result.seconds:.2f} s. Largest error of the aligned sources: "
        f"{number_text(report.result.aligned_sources_max_error)}."
    )
    lines += [*_score_lines(report), *_group_lines(report)]
    lines += [
        "",
        *[f"- {shown(text)}" for text in (*report.result.warnings, *report.result.notes, *report.not_measured)],
    ]
    repeated = [command for command in (report.command, report.recipe_command) if command is not None]
    lines += ["", "Repeat it:", "", *[f"    {command}" for command in repeated]]
    return "\n".join(lines).rstrip() + "\n"


def _score_lines(report: Report) -> list[str]:
    own = list(zip([file.name for file in report.sources], report.scores.sources, strict=False))
    if not own:
        return []
    heads, rows = ["model", "loss", "accuracy"], []
    has_tokens = own[0][1].is_of_tokens
    heads += ["perplexity"] * has_tokens
    for name, score in [*own, *report.scores.rows]:
        cells = [as_markdown(name), number_text(score.loss), percent(score.accuracy)]
        cells += [number_text(score.perplexity)] * has_tokens
        rows.append(f"| {' | '.join(cells)} |")
    return ["", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *rows]


def _group_lines(report: Report) -> list[str]:
    heads = ["neuron group", "neurons", "cost", "status", "coupled by"]
    has_symmetries = any(group.symmetries for group in report.groups)
    if has_symmetries:
        heads.append("symmetries")
    rows = []
    for facts in report.groups:
        group = facts.report
        cells = [group.name, str(group.size), number_text(group.cost), status_word(group.status), group.solver]
        if has_symmetries:
            cells.append(", ".join(facts.symmetries) or "–")
        rows.append(f"| {' | '.join(map(as_markdown, cells))} |")
    sentence = symmetry_sentence(report)
    return [
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
        *rows,
        *(["", as_markdown(sentence)] if sentence else []),
    ]
