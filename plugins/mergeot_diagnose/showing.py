"""What ``mergeot diagnose`` prints for a reader: sentences, tables, and the command to run next."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

from mergekit_ot import printable
from mergeot_diagnose.findings import Basin, Diagnosis, PairDiagnosis

_VERDICTS = {
    Basin.ONE: "in one basin: their plain average works",
    Basin.APART: "not in one basin: their neurons have to be aligned",
    Basin.UNKNOWN: "it cannot be said whether they are in one basin",
}
_MOST_PINS = 6


def show(diagnosis: Diagnosis, command: str) -> None:
    """Prints a diagnosis on standard error, and the command on standard output."""
    for pair in diagnosis.pairs:
        _say(f"{pair.names[0]} and {pair.names[1]}: {_VERDICTS[pair.basin]}.")
        for sentence in reasons(pair):
            _say(f"  {sentence}")
        _show_layers(pair)
    for sentence in facts(diagnosis):
        _say(sentence)
    _say("")
    _say(f"Advised: {diagnosis.advice.why}")
    for note in diagnosis.advice.notes:
        _say(f"  {note}")
    for sentence in expectations(diagnosis):
        _say(f"  {sentence}")
    _say(f"  Measured on: mergeot docs {diagnosis.advice.evidence}")
    _say("Run:")
    print(printable(command), flush=True)


def reasons(pair: PairDiagnosis) -> Iterator[str]:
    """Yields why two networks are said to be in one basin, or not.

    Example:
        >>> from mergeot_diagnose.weights import WeightComparison
        >>> weights = WeightComparison(0.02, 0.3, 0.02, {})
        >>> next(reasons(PairDiagnosis(("a", "b"), Basin.APART, weights, (), None, None, "")))
        'Cosine of the weights 0.02; 0.30 when aligned, 0.02 in a random order: 0 % of an alignment is there already.'
    """
    weights = pair.weights
    if weights is not None and weights.cosine is not None:
        held = weights.held
        share = "nothing follows" if held is None else f"{100 * held:.0f} % of an alignment is there already"
        orders = f"{weights.aligned:.2f} when aligned, {weights.random:.2f} in a random order"
        yield f"Cosine of the weights {weights.cosine:.2f}; {orders}: {share}."
    elif weights is not None:
        yield "They have layers of different width, so there is no straight path between them."
    if pair.naive is not None:
        yield f"Barrier on the straight path: {pair.naive.words}."
    if pair.naive is not None and pair.naive.is_flat and pair.basin is Basin.UNKNOWN:
        yield "The path is flat on these data, though their neurons are in orders of their own: it may be luck."
    if pair.aligned is not None:
        yield f"After {pair.solver}: {pair.aligned.words}."


def facts(diagnosis: Diagnosis) -> Iterator[str]:
    """Yields what is known of the networks themselves."""
    kind = diagnosis.kind
    groups = "1 group" if kind.free_groups == 1 else f"{kind.free_groups} groups"
    yield f"Network: {kind.words}; {groups} of neurons to align, which {kind.free_percent:.0f} % of the weights touch."
    for pin in kind.pins[:_MOST_PINS]:
        yield f"  pinned: {pin}"
    if len(kind.pins) > _MOST_PINS:
        yield f"  pinned: {len(kind.pins) - _MOST_PINS} more reasons; 'mergeot check' lists all."
    if diagnosis.accuracies is not None:
        each = ", ".join(f"{accuracy:.1f} %" for accuracy in diagnosis.accuracies)
        yield f"Accuracy on {diagnosis.samples} samples: {each}."
    if diagnosis.disagreement is not None:
        yield f"Their answers differ for {100 * diagnosis.disagreement:.1f} % of {diagnosis.samples} samples."
    if diagnosis.samples and not diagnosis.is_labelled:
        yield "The data have no targets: in their place stands what all networks say together."
    if diagnosis.saw_different_things:
        yield "They are sure of different classes: they saw different data."
    for note in diagnosis.notes:
        yield f"note: {note}"


def expectations(diagnosis: Diagnosis) -> Iterator[str]:
    """Yields what to expect of the fused network."""
    expected = diagnosis.advice.expected
    if expected is None:
        return
    low, high = expected
    yield f"Expect {low:+.0f} to {high:+.0f} points of accuracy over the mean of the networks."
    between, accuracies = diagnosis.expected_accuracy, diagnosis.accuracies
    if between is None or accuracies is None:
        return
    yield f"Here that is {between[0]:.1f} to {between[1]:.1f} %."
    best = max(accuracies)
    name = diagnosis.names[accuracies.index(best)]
    if best > between[1]:
        yield f"{name} alone ({best:.1f} %) is likely the better network."
    elif best > between[0]:
        yield f"{name} alone ({best:.1f} %) may be the better network: compare on data of your own."


def _show_layers(pair: PairDiagnosis) -> None:
    rows = [
        (layer.name, _sizes(layer.sizes), _number(layer.cka, "{:.3f}"), _number(layer.same_place, "{:.0%}"))
        for layer in pair.layers
    ]
    if rows:
        _show_table(("layer", "neurons", "CKA", "at the same place"), rows)


def _sizes(sizes: tuple[int, int]) -> str:
    return str(sizes[0]) if sizes[0] == sizes[1] else f"{sizes[0]} / {sizes[1]}"


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else form.format(value)


def _show_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(names):
        table.add_column(name, justify="right" if place else "left", overflow="fold")
    for row in rows:
        table.add_row(*[Text(printable(cell)) for cell in row])
    width = None if sys.stderr.isatty() else 160
    Console(file=sys.stderr, width=width, highlight=False).print(table)


def _say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)
