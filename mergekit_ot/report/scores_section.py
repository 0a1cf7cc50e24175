"""The sections of a report's page about what was measured: the verdict, the scores, the path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from mergekit_ot.report.charts import bar_chart, line_chart, sample
from mergekit_ot.report.facts import Report, accuracy_gap
from mergekit_ot.report.markup import Markup, join, tag
from mergekit_ot.report.scores import PATH_POINTS
from mergekit_ot.scoring.evaluation import Evaluation


def verdict(report: Report) -> str:
    """Returns the outcome in a sentence or two."""
    scores, method = report.scores, f"fused with {report.recipe.solver}"
    number = len(report.sources)
    whole = f"{number} networks were {method}" if number > 1 else f"One network was {method} into other sizes"
    if scores.fused is None:
        return f"{whole}. {exactness(report)} Nothing was scored, so what the fused network is worth is open."
    if scores.fused.accuracy is None:
        compared = _compared_losses(scores.fused, _references(report))
        return f"{whole}. On the data the fused network has a loss of {number_text(scores.fused.loss)}{compared}."
    gaps = [(accuracy_gap(scores.fused, score), name, score.accuracy) for name, score in _references(report)]
    compared = ", ".join(f"{_gap(gap)} {name} ({percent(accuracy)})" for gap, name, accuracy in gaps if gap is not None)
    return f"{whole}. The fused network is right on {percent(scores.fused.accuracy)} of the test data: {compared}."


def _references(report: Report) -> list[tuple[str, Evaluation]]:
    scores = report.scores
    named = [
        ("the sources' mean" if len(report.sources) > 1 else "the source", scores.mean),
        ("their ensemble", scores.ensemble),
        ("their naive average", scores.naive),
    ]
    return [(name, score) for name, score in named if score is not None]


def _gap(gap: float) -> str:
    if round(gap, 2) == 0:
        return "level with"
    return f"{abs(gap):.2f} points {'above' if gap > 0 else 'below'}"


def _compared_losses(fused: Evaluation, references: Sequence[tuple[str, Evaluation]]) -> str:
    shown = [f"{number_text(score.loss)} for {name}" for name, score in references if score.loss != fused.loss]
    return f"; {', '.join(shown)}" if shown else ""


def exactness(report: Report) -> str:
    """Returns what comparing the aligned sources with the sources showed, and how much is aligned."""
    check = report.result.check
    return f"{'' if check is None else check.sentence} {report.result.extent.sentence}".strip()


def scores_section(report: Report) -> Markup:
    """Returns the section with a row and a bar per model."""
    scores = report.scores
    head = tag("h2", "Scores")
    if scores.fused is None:
        return tag("section", head, tag("p", scores.missing), id="scores")
    models = _scored_models(report)
    is_classes = scores.fused.accuracy is not None
    caption = f"Measured on {scores.fused.count:,} targets of {scores.data}."
    table = _score_table(models, scores.mean, caption, is_classes)
    chart = _score_chart([model for model in models if model.kind != "mean"], is_classes)
    note = (
        "Test part of the data, where it has parts. These targets were read for this report only, never by the fusion. "
        "The mean of the sources and the ensemble (the mean of their probabilities) use the model weights; 'vs mean' "
        "is the accuracy less that mean, in percent points."
    )
    why = tag("p", scores.naive_missing) if scores.naive_missing and len(report.sources) > 1 else None
    shown = tag("div", scrolled(table, "Scores"), chart, class_="beside")
    return tag("section", head, shown, why, tag("p", note, class_="soft"), id="scores")


class _Scored(NamedTuple):
    """A row of the scores: its name, its class in the style sheet, and what was measured."""

    name: str
    kind: str
    score: Evaluation

    @property
    def bar(self) -> tuple[str, float, str]:
        """Name, length and value of its bar: errors, or the loss where there are no classes."""
        name, accuracy = self.name.partition(":")[0], self.score.accuracy
        if accuracy is None:
            return name, self.score.loss, number_text(self.score.loss)
        return name, 100 - accuracy, f"{100 - accuracy:.2f} %"


def _scored_models(report: Report) -> list[_Scored]:
    pairs = zip(report.sources, report.scores.sources, strict=True)
    sources = [_Scored(f"source {n}: {file.short}", "source", score) for n, (file, score) in enumerate(pairs, start=1)]
    return sources + [_Scored(name, name.partition(" ")[0], score) for name, score in report.scores.rows]


def _score_table(models: Sequence[_Scored], mean: Evaluation | None, caption: str, is_classes: bool) -> Markup:
    heads = ["model", "loss", *(["accuracy", "vs mean"] if is_classes else [])]
    heads += ["perplexity"] * models[0].score.is_of_tokens
    titles = [tag("th", head, scope="col", class_="number" if place else None) for place, head in enumerate(heads)]
    rows = [_row(model, mean, is_classes) for model in models]
    return tag("table", tag("caption", caption), tag("thead", tag("tr", *titles)), tag("tbody", *rows))


def _row(model: _Scored, mean: Evaluation | None, is_classes: bool) -> Markup:
    score = model.score
    cells = [tag("th", model.name, scope="row"), tag("td", number_text(score.loss), class_="number")]
    if is_classes:
        gap = None if mean is None or model.kind == "mean" else accuracy_gap(score, mean)
        cells += [
            tag("td", percent(score.accuracy), class_="number"),
            tag("td", "" if gap is None else f"{gap:+.2f}".replace("-", "−"), class_="number"),
        ]
    if score.is_of_tokens:
        cells.append(tag("td", number_text(score.perplexity), class_="number"))
    return tag("tr", *cells, class_=model.kind)


def _score_chart(models: Sequence[_Scored], is_classes: bool) -> Markup:
    measure = "Error (100 % − accuracy)" if is_classes else "Loss"
    bars = [model.bar for model in models]
    title = f"{measure} of {', '.join(f'{name}: {text}' for name, _, text in bars)}"
    chart = bar_chart(bars, [model.kind for model in models], title, "scores")
    return tag("figure", tag("figcaption", f"{measure}; shorter is better."), chart)


def path_section(report: Report) -> Markup | None:
    """Returns the section with the path between two sources, or why there is none; None where nothing was scored."""
    scores = report.scores
    if scores.fused is None:
        return None
    head = tag("h2", "Path between the sources")
    if not scores.curves:
        return tag("section", head, tag("p", scores.path_missing), id="path")
    t = report.recipe.weights[1]
    panels = ["accuracy", "loss"] if scores.fused.accuracy is not None else ["loss"]
    charts = []
    for panel in panels:
        values = {"accuracy": scores.fused.accuracy, "loss": scores.fused.loss}[panel]
        shown = "; ".join(f"{name}: barrier {_height(report, name, panel)}" for name in scores.curves)
        title = f"{panel} on the straight path from source 1 to source 2. {shown}"
        point = None if values is None else (t, values)
        charts.append(tag("figure", line_chart(scores.curves, panel, point, title, panel)))
    words = {"naive": "naive: the sources as they are", "aligned": f"aligned by {report.recipe.solver}"}
    legend = [
        tag("li", sample(name), tag("span", f"{words[name]} (barrier {_heights(report, name)})"))
        for name in scores.curves
    ]
    legend.append(tag("li", sample("fused"), tag("span", f"the fused model, t = {t:.4g}")))
    notes = [
        f"Every mixture (1 − t)·source 1 + t·source 2, at {PATH_POINTS} points. The barrier is the largest rise above "
        "the straight line between the two ends; 0 means that the sources are linearly connected."
    ]
    if report.recipe.repair != "none":
        notes.append(f"The curves are without the repair '{report.recipe.repair}'; the fused model is with it.")
    if not report.is_exact:
        notes.append("The ends of the aligned path are the sources moved by soft plans, not the sources themselves.")
    return tag(
        "section",
        head,
        tag("ul", *legend, class_="legend"),
        tag("div", *charts, class_="two"),
        tag("p", " ".join(notes), class_="soft"),
        id="path",
    )


def _height(report: Report, name: str, panel: str) -> str:
    curve = report.scores.curves[name]
    if panel == "loss":
        return number_text(curve["loss_barrier"])
    height = curve["error_barrier"]
    return "unknown" if height is None else f"{height:.2f} points"


def _heights(report: Report, name: str) -> str:
    error = report.scores.curves[name]["error_barrier"]
    loss = f"{_height(report, name, 'loss')} in loss"
    return loss if error is None else f"{error:.2f} points of error, {loss}"


def scrolled(table: Markup, name: str) -> Markup:
    """Returns a table that scrolls within itself where the page is narrow, also by keyboard."""
    return tag("div", table, class_="scroll", tabindex="0", role="region", aria_label=name)


def percent(value: float | None) -> str:
    """Returns an accuracy with two decimals."""
    return "–" if value is None else f"{value:.2f} %"


def number_text(value: float | None) -> str:
    """Returns a number with four significant digits."""
    if value is None:
        return "–"
    return f"{value:.4g}" if math.isfinite(value) else "not finite"


def definitions(pairs: Sequence[tuple[str, object]]) -> Markup:
    """Returns a list of names and what they stand for."""
    return tag("dl", join(*[join(tag("dt", name), tag("dd", value)) for name, value in pairs]))
