"""Tables of results as markdown, and on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from mergeot_experiments.catalogue.descriptions import DIGITS, LOSS
from mergeot_experiments.results.tables import ResultTable, Row

_HEAD = """\
# Measured results

Written by `mergeot experiments table`; `mergeot docs experiments` tells how to run them.

Accuracy in percent on test images, which no network was trained on and nothing was chosen by: mean ± sample standard
deviation over sets of sources from different seeds, with their number in brackets where not all sets were run.
`s` is the mean time of one fusion in seconds. Rows of the sources and of their ensemble (the weighted mean of their
probabilities; as many networks as there are sources) are for comparison; all other rows are one network.
"""
_LOSS = "\nThe numbers are losses on test data, lower is better; `groups` counts the fused network's neuron groups.\n"
_OLD = "† measured by an earlier version of the solver or the core; its command measures it anew.\n"


def as_markdown(tables: Sequence[ResultTable]) -> str:
    """Returns a page with all tables."""
    sections = [_HEAD, *map(_section, tables)]
    if not all(table.is_current for table in tables):
        sections.append(_OLD)
    return "\n".join(sections)


def _section(table: ResultTable) -> str:
    head, lines = _cells(table)
    what = f"`{table.experiment.name}`, {_scale(table)}, {_sets(table)}"
    if table.scale == DIGITS:
        what += ", small networks in place of these"
    about = f"{what}: {table.experiment.summary}.\n"
    if table.experiment.metric == LOSS:
        about += _LOSS
    grid = [head, ["---" if name in ("sources", "network", "command") else "---:" for name in head], *lines]
    return "\n".join(
        [
            f"## {table.experiment.title}\n",
            about,
            *(f"- {description}" for description in table.sources),
            "",
            *("| " + " | ".join(line) + " |" for line in grid),
            "",
            f"{_measured(table)}\n",
        ]
    )


def _sets(table: ResultTable) -> str:
    return f"{table.repetitions} {'set' if table.repetitions == 1 else 'sets'} of sources"


def _measured(table: ResultTable) -> str:
    """Returns when, and with which packages: sections may be of different days."""
    days = sorted({cell.measured["at"][:10] for cell in table.cells})
    used = [_versions(table, name) for name in ("mergekit_ot", "torch")]
    span = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"Measured {span} with {' and '.join(used)}."


def _versions(table: ResultTable, package: str) -> str:
    versions = sorted({cell.measured[package] for cell in table.cells})
    return f"{package} {', '.join(versions)}"


def _scale(table: ResultTable) -> str:
    return "scikit-learn's digits" if table.scale == DIGITS else f"{table.scale} scale"


def _cells(table: ResultTable) -> tuple[list[str], list[list[str]]]:
    has_blocks = any(row.block for row in table.rows)
    head = [*(["sources"] if has_blocks else []), "network", *table.columns]
    head += [*(["groups"] if table.experiment.metric == LOSS else []), "s", "command"]
    return head, [_line(row, table, has_blocks) for row in table.rows]


def _line(row: Row, table: ResultTable, has_blocks: bool) -> list[str]:
    summaries = [row.summaries.get(column) for column in table.columns]
    return [
        *([row.block] if has_blocks else []),
        row.name if row.is_current else f"{row.name} †",
        *("–" if summary is None else summary.text(table.repetitions) for summary in summaries),
        *(["" if row.groups is None else str(row.groups)] if table.experiment.metric == LOSS else []),
        "" if row.seconds is None else f"{row.seconds:.1f}",
        f"`{row.command}`",
    ]


def show(table: ResultTable) -> None:
    """Prints a table on standard error, without the commands."""
    import sys

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    head, lines = _cells(table)
    measure = "loss" if table.experiment.metric == LOSS else "accuracy in percent"
    title = f"{table.experiment.title} ({_scale(table)}): {measure}, {_sets(table)}"
    grid = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in head[:-1]:
        grid.add_column(Text(name), justify="left" if name in ("sources", "network") else "right", no_wrap=True)
    for line in lines:
        grid.add_row(*map(Text, line[:-1]))
    console = Console(file=sys.stderr, width=None if sys.stderr.isatty() else 200, highlight=False)
    console.print(grid)
    if not table.is_current:
        console.print(_OLD.strip())
