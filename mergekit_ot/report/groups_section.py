"""The sections of a report's page about neuron groups: a table, and a picture of every coupling."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from mergekit_ot.report.facts import Report
from mergekit_ot.report.group_facts import CouplingFacts, GroupFacts
from mergekit_ot.report.markup import Markup, join, tag
from mergekit_ot.report.rasters import coupling_picture
from mergekit_ot.report.scores_section import number_text, scrolled
from mergekit_ot.transport.problem import Status

# Heading, class and content of a column.
_Column = tuple[str, str | None, Callable[[GroupFacts], str]]
# Characters of all pictures together: a page stays small enough to be sent.
_ROOM = 1_400_000
_SIDE = 112
_CELLS = (96, 56, 32)
_MANY = (60, 240)


def groups_section(report: Report) -> Markup:
    """Returns the section with one row per neuron group."""
    head = tag("h2", "Neuron groups")
    if not report.groups:
        return tag(
            "section", head, tag("p", "No neuron group was aligned: every neuron stayed in its place."), id="groups"
        )
    columns = _columns(report)
    heads = [tag("th", name, scope="col", class_=kind) for name, kind, _ in columns]
    rows = [_row(columns, group) for group in report.groups]
    caption = "Cost: what the solver minimised in this group, after its last step."
    if len(report.sources) > 1:
        caption += " Several numbers in a cell are those of the sources, in order."
    if any(group.orders > 1 for group in report.groups):
        caption += " 2 × 8: two orders of 8 neurons each, such as one per head; what moved is counted within each."
    table = tag("table", tag("caption", caption), tag("thead", tag("tr", *heads)), tag("tbody", *rows), class_="groups")
    summary = tag("p", f"{_summary(report)} {symmetry_sentence(report)}".rstrip())
    return tag("section", head, summary, scrolled(table, "Neuron groups"), _advice(report), id="groups")


def symmetry_sentence(report: Report) -> str:
    """Returns for how many groups each symmetry was proven that the solver may use; empty where there is none."""
    if not report.symmetries:
        return ""
    counts = [
        f"{name} (proven for {len(groups) or 'none'} of {len(report.groups)} groups)"
        for name, groups in report.symmetries.items()
    ]
    return f"Symmetries that the solver may use besides the order of neurons: {', '.join(counts)}."


def _row(columns: Sequence[_Column], group: GroupFacts) -> Markup:
    cells = [
        tag("td" if place else "th", show(group), scope=None if place else "row", class_=kind)
        for place, (_, kind, show) in enumerate(columns)
    ]
    return tag("tr", *cells)


def _summary(report: Report) -> str:
    neurons = sum(group.report.size * group.orders for group in report.groups)
    negated, alone = sum(group.negated for group in report.groups), sum(group.alone for group in report.groups)
    turned = sum(group.is_rotation for group in report.groups)
    soft = sum(not group.is_permutation for group in report.groups) - turned
    clauses = (
        f"{len(report.groups)} groups with {neurons:,} neurons in the fused model",
        _coupled(soft, turned),
        f"{negated:,} neurons arrive negated" if negated else "no neuron negated",
        f"{alone:,} places kept apart without a partner" if alone else "none without a partner",
    )
    return "; ".join(clauses) + "."


def _coupled(soft: int, turned: int) -> str:
    counts = [
        *([f"{turned} of them by rotations"] if turned else []),
        *([f"{soft} of them coupled by plans that are no permutations"] if soft else []),
    ]
    return ", ".join(counts) or "all coupled by permutations"


def _advice(report: Report) -> Markup | None:
    statuses = {group.report.status for group in report.groups} - {Status.CONVERGED}
    if not statuses:
        return None
    return join(*[tag("p", status.value, class_="soft") for status in sorted(statuses, key=lambda status: status.name)])


def _columns(report: Report) -> list[_Column]:
    """Returns heading, class and content of each column; one that says nothing in any row is left out."""
    groups, facts = report.groups, list(itertools.chain(*[group.facts for group in report.groups]))
    always: list[_Column] = [
        ("group", None, lambda group: group.report.name),
        ("neurons", "number", _size),
        ("cost", "number", lambda group: number_text(group.report.cost)),
        ("status", None, lambda group: group.report.status.name.lower().replace("_", " ")),
        ("coupled by", None, lambda group: group.report.solver),
        ("coupling", None, _kind),
    ]
    sometimes: list[tuple[bool, str, str | None, Callable[[GroupFacts], str]]] = [
        (any(group.symmetries for group in groups), "symmetries", None, _symmetries),
        (any(fact.moved is not None for fact in facts), "moved", "number", _each(lambda fact: fact.moved)),
        (any(group.negated for group in groups), "negated", "number", _each(lambda fact: fact.negated)),
        (any(group.alone for group in groups), "without partner", "number", _each(lambda fact: fact.alone)),
        (
            not all(group.is_permutation for group in groups),
            "partners each",
            "number",
            _each(lambda fact: f"{fact.partners:.3g}"),
        ),
    ]
    return always + [(name, kind, show) for says_something, name, kind, show in sometimes if says_something]


def _size(group: GroupFacts) -> str:
    sizes = [fact.size for fact in group.facts]
    times = f"{group.orders} × " if group.orders > 1 else ""
    own = "" if set(sizes) <= {group.report.size} else f" (from {', '.join(map(str, sizes))})"
    return f"{times}{group.report.size}{own}"


def _kind(group: GroupFacts) -> str:
    if not group.facts:
        return "in place"
    if group.is_permutation:
        return "permutation"
    return "rotation" if group.is_rotation else "transport plan"


def _symmetries(group: GroupFacts) -> str:
    return ", ".join(group.symmetries) or "–"


def _each(what: Callable[[CouplingFacts], object]) -> Callable[[GroupFacts], str]:
    """Returns what shows a fact of every source, in order."""

    def shown(group: GroupFacts) -> str:
        values = [what(fact) for fact in group.facts]
        return ", ".join(["–" if value is None else str(value) for value in values]) or "–"

    return shown


def couplings_section(report: Report) -> Markup | None:
    """Returns the section with a picture per group and source; None where nothing was coupled."""
    groups = [group for group in report.groups if group.couplings]
    if not groups:
        return None
    pictures = sum(len(group.couplings) for group in groups)
    cells = next((size for size, many in zip(_CELLS, _MANY, strict=False) if pictures <= many), _CELLS[-1])
    figures = _figures(groups, cells)
    left = len(groups) - len(figures)
    count = "1 more group is" if left == 1 else f"{left} more groups are"
    more = tag("p", f"{count} not drawn, to keep the page small.") if left else None
    return tag(
        "section",
        tag("h2", "Couplings"),
        tag("p", _legend(groups, cells), class_="soft"),
        tag("div", *figures, class_="couplings"),
        more,
        id="couplings",
    )


def _figures(groups: Sequence[GroupFacts], cells: int) -> list[Markup]:
    """Returns the pictures of the first groups: as many as there is room for."""
    figures: list[Markup] = []
    used = 0
    for group in groups:
        figure = _figure(group, cells)
        used += len(figure)
        if used > _ROOM:
            break
        figures.append(figure)
    return figures


def _legend(groups: Sequence[GroupFacts], cells: int) -> str:
    words = (
        "Rows are neurons of the fused group, from the top; columns are neurons of the source, from the left. A point "
        "is a pair that is coupled, the darker the more; on the diagonal a neuron stays in its place."
    )
    if any(group.negated for group in groups):
        words += " Orange: arrives negated."
    if any(_most_neurons(group) > cells for group in groups):
        words += f" In groups of more than {cells} neurons several share a point."
    return words


def _most_neurons(group: GroupFacts) -> int:
    return group.orders * max(group.report.size, *(fact.size for fact in group.facts))


def _figure(group: GroupFacts, cells: int) -> Markup:
    drawn = []
    for number, (coupling, fact) in enumerate(zip(group.couplings, group.facts, strict=True), start=1):
        address, width, height = coupling_picture(coupling, cells)
        image = tag("img", src=address, alt=_words(group, fact, number), **_displayed(width, height))
        drawn.append(tag("div", f"source {number}", image))
    return tag("figure", tag("figcaption", group.report.name), tag("div", *drawn, class_="pictures"))


def _displayed(width: int, height: int) -> dict[str, int]:
    longest = max(width, height)
    return {"width": max(8, _SIDE * width // longest), "height": max(8, _SIDE * height // longest)}


def _words(group: GroupFacts, fact: CouplingFacts, number: int) -> str:
    kind = "permutation" if fact.is_permutation else "rotation" if fact.is_rotation else "transport plan"
    moved = "" if fact.moved is None else f", {fact.moved} moved"
    return f"Coupling of {group.report.name} with source {number}: {kind}, {_size(group)} neurons{moved}"
