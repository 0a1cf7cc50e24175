"""The page of a report: one HTML file that needs no other, no script and no network."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from mergekit_ot.fusion.options import option_fields
from mergekit_ot.recipe import FusionRecipe
from mergekit_ot.report.facts import FileFacts, Report
from mergekit_ot.report.groups_section import couplings_section, groups_section
from mergekit_ot.report.markup import Markup, join, tag
from mergekit_ot.report.scores_section import (
    definitions,
    exactness,
    path_section,
    percent,
    scores_section,
    scrolled,
    verdict,
)
from mergekit_ot.report.style import STYLE

_NAMES = {
    "sources": "Sources",
    "scores": "Scores",
    "path": "Path",
    "groups": "Neuron groups",
    "couplings": "Couplings",
    "warnings": "Warnings",
    "method": "Method",
    "plan": "Plan",
    "repeat": "Repeat it",
}
_FEW_STEPS = 6
_UNITS = ("bytes", "kB", "MB", "GB", "TB")


def report_page(report: Report) -> str:
    """Returns the page of a report as HTML."""
    sections = {
        "sources": sources_section(report),
        "scores": scores_section(report),
        "path": path_section(report),
        "groups": groups_section(report),
        "couplings": couplings_section(report),
        "warnings": warnings_section(report),
        "method": method_section(report),
        "plan": plan_section(report),
        "repeat": repeat_section(report),
    }
    there = {name: section for name, section in sections.items() if section is not None}
    title = f"{' + '.join(file.short for file in report.sources)} → {report.fused.short}"
    links = [tag("li", tag("a", _NAMES[name], href=f"#{name}")) for name in there]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name_="color-scheme", content="light dark"),
        tag("title", f"Fusion report: {title}"),
        # Without an icon of its own a page makes browsers ask for one.
        tag("link", rel="icon", href="data:,"),
        tag("style", Markup(STYLE)),
    )
    body = tag(
        "body",
        tag(
            "header",
            tag("p", f"Fusion report · {report.made_at}", class_="kind"),
            tag("h1", title),
            tag("p", verdict(report), class_="verdict"),
            tag("nav", tag("ul", *links), aria_label="Sections"),
        ),
        tag("main", *there.values()),
        tag("footer", _footer(report)),
    )
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def sources_section(report: Report) -> Markup:
    """Returns the section with a card per source, and one for the fused model."""
    scores: list[float | None] = [score.accuracy for score in report.scores.sources]
    accuracies = scores or [None] * len(report.sources)
    cards = [
        _card(f"source {number}", file, accuracy)
        for number, (file, accuracy) in enumerate(zip(report.sources, accuracies, strict=True), start=1)
    ]
    fused = report.scores.fused
    cards.append(_card("fused model", report.fused, None if fused is None else fused.accuracy))
    return tag("section", tag("h2", "Sources and fused model"), tag("div", *cards, class_="cards"), id="sources")


def _card(kind: str, file: FileFacts, accuracy: float | None) -> Markup:
    pairs: list[tuple[str, object]] = [
        ("file", tag("code", file.name)),
        ("architecture", tag("code", file.architecture)),
    ]
    if file.weight is not None:
        pairs.append(("model weight", f"{file.weight:.6g}"))
    pairs.append(("size", f"{file.parameters:,} parameters, {_bytes(file.size)}"))
    if accuracy is not None:
        pairs.append(("accuracy", percent(accuracy)))
    pairs.append(("SHA-256", tag("code", file.sha256)))
    return tag("div", tag("h3", kind), definitions(pairs), class_="card")


def _bytes(size: int) -> str:
    shown, place = float(size), 0
    while shown >= 1000 and place < len(_UNITS) - 1:
        shown, place = shown / 1000, place + 1
    return f"{shown:.3g} {_UNITS[place]}"


def warnings_section(report: Report) -> Markup:
    """Returns the section with the warnings of the fusion."""
    warnings = report.result.warnings
    content = tag("ul", *[tag("li", text) for text in warnings], class_="warnings") if warnings else tag("p", "None.")
    return tag("section", tag("h2", "Warnings"), content, id="warnings")


def method_section(report: Report) -> Markup:
    """Returns the section with every setting, the check of the aligned sources and the times."""
    result = report.result
    pairs = [*_settings(report), ("aligned sources", exactness(report))]
    pairs += [(f"objective, {when}", f"{value:.6g}") for when, value in result.objectives.items()]
    pairs += [("what the repair did", text) for text in result.notes]
    if result.repair_comparison is not None:
        pairs.append(("how near to the sources together", result.repair_comparison.sentence))
    pairs.append(("time", _times(report)))
    return tag("section", tag("h2", "Method"), definitions(pairs), id="method")


def _settings(report: Report) -> list[tuple[str, object]]:
    """Returns every choice under its name; one that has no words here is shown where it is not the default."""
    recipe = report.recipe
    shape = "the checkpoint's or the data's" if recipe.input_shape is None else ",".join(map(str, recipe.input_shape))
    calibration = "none"
    if recipe.data is not None:
        most = f"{recipe.calibration_size:,} inputs"
        if recipe.calibration_tokens is not None:
            most = f"{recipe.calibration_tokens:,} tokens"
        calibration = f"{recipe.data} (for calibration at most {most}, without targets)"
    chosen: dict[str, object] = {
        "solver": recipe.solver,
        "solver_options": _listed(recipe.solver_options) or "its defaults",
        "measure": recipe.measure or "the solver's own",
        "model_weights": ", ".join(f"{weight:.6g}" for weight in recipe.weights),
        "target": f"sizes of source {recipe.target + 1}" if isinstance(recipe.target, int) else recipe.target,
        "data": calibration,
        "repair": recipe.repair,
        **({"repair_options": _listed(recipe.repair_options)} if recipe.repair_options else {}),
        "refine": "yes" if recipe.refine else "no",
        "restarts": recipe.restarts,
        "input_shape": shape,
        "front_end": recipe.front_end,
        "device": report.device,
        "seed": recipe.seed,
    }
    names = {"refine": "refinement"}
    shown = {**chosen, **_unusual(recipe, {*chosen, "repair_options", "calibration_size", "calibration_tokens"})}
    return [(names.get(name, name.replace("_", " ")), value) for name, value in shown.items()]


def _listed(options: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())


def _unusual(recipe: FusionRecipe, shown: Collection[str]) -> dict[str, object]:
    """Returns the options that are not the default, but for those that are shown anyhow."""
    fields = [field for field in option_fields("fuse") if field.name not in shown]
    values = {field.name: getattr(recipe, field.name) for field in fields}
    return {field.name: values[field.name] for field in fields if values[field.name] != field.default}


def _times(report: Report) -> str:
    fusing = f"{report.result.seconds:.2f} s for the fusion"
    return f"{fusing}, {report.scores.seconds:.2f} s for the scores of this report" if report.scores.seconds else fusing


def plan_section(report: Report) -> Markup | None:
    """Returns the section with the steps of the plan; None where there are none."""
    plan = report.result.plan
    rows = plan.describe()
    if not rows:
        return None
    names = list(rows[0])
    head = [tag("th", name, scope="col", class_=None if name == "groups" else "number") for name in names]
    body = [
        tag("tr", *[tag("td", value, class_=None if name == "groups" else "number") for name, value in row.items()])
        for row in rows
    ]
    caption = (
        f"The steps of a sweep; {plan.max_sweeps} {'sweep' if plan.max_sweeps == 1 else 'sweeps'} at most, "
        f"start: {plan.start.value}. Counts are parameters."
    )
    table = tag("table", tag("caption", caption), tag("thead", tag("tr", *head)), tag("tbody", *body))
    steps = "1 step" if len(rows) == 1 else f"{len(rows)} steps"
    shown = tag("details", tag("summary", steps), scrolled(table, "Plan"), open=len(rows) <= _FEW_STEPS)
    return tag("section", tag("h2", "Plan"), shown, id="plan")


def repeat_section(report: Report) -> Markup:
    """Returns the section with the commands that repeat the fusion."""
    commands: list[Markup] = []
    if report.command is not None:
        commands += [tag("h3", "By flags"), tag("pre", tag("code", report.command))]
    commands += [tag("h3", "By the recipe beside this page"), tag("pre", tag("code", report.recipe_command))]
    note = (
        "To be run in the folder where it was run first: names of files are as they were typed, those of files "
        "elsewhere that had been named by an absolute path without their folders. With the same versions "
        "on the same kind of machine the fused tensors come out the same to the last bit."
    )
    shown = definitions(list(report.versions.items()))
    return tag(
        "section",
        tag("h2", "Repeat it"),
        *commands,
        tag("p", note, class_="soft"),
        tag("h3", "Ran with"),
        shown,
        id="repeat",
    )


def _footer(report: Report) -> Markup:
    return join(f"Made by mergekit_ot {report.versions['mergekit_ot']}.")
