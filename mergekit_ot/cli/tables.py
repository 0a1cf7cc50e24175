"""Tables on standard error: they fold in narrow terminals, and where columns would not fit, rows become lists."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_ot.text import printable

# Where nothing says how wide the reader's lines are.
_WIDTH = 160
# Narrower than that, a column of long words cannot be read; and what stands between two.
_LEAST, _BETWEEN = 12, 3


def show_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None, title: str = "") -> None:
    """Prints records as a table on standard error; numbers stand right, missing values are a dash."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names = list(columns or (rows[0] if rows else ()))
    console = Console(file=sys.stderr, width=_width(), highlight=False)
    if _least_width(rows, names) > console.width:
        _show_lists(console, rows, names, title)
        return
    heading = Text(printable(title), style="table.title") if title else None
    table = Table(title=heading, title_justify="left", header_style="bold", box=_box(), pad_edge=False)
    whole = _whole_words(rows, names, console.width)
    for name in names:
        is_number = all(isinstance(row.get(name), int | float | None) for row in rows)
        justify = "right" if is_number else "left"
        table.add_column(Text(printable(name)), justify=justify, overflow="fold", min_width=whole.get(name))
    for row in rows:
        table.add_row(*[Text(shown(row.get(name))) for name in names])
    console.print(table)


def _width() -> int | None:
    """Returns how wide lines are; None where the terminal says it."""
    said = os.environ.get("COLUMNS", "")
    if said.isdecimal() and 0 < int(said) < 10_000:
        return int(said)
    return None if sys.stderr.isatty() else _WIDTH


def _least_width(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> int:
    """Returns how wide a table has to be for its cells to be read."""
    cells = {name: max([len(name), *(len(shown(row.get(name))) for row in rows)], default=0) for name in names}
    return sum(min(length, _LEAST) + _BETWEEN for length in cells.values())


def _whole_words(rows: Sequence[Mapping[str, Any]], names: Sequence[str], width: int) -> dict[str, int]:
    """Returns the columns, from the left, whose words need not be broken, and how wide they are then."""
    left, widths = width - _BETWEEN * len(names), dict[str, int]()
    for place, name in enumerate(names):
        cells = [name, *(shown(row.get(name)) for row in rows)]
        longest = max(len(word) for cell in cells for word in (cell.split() or [""]))
        if left - longest < _LEAST * (len(names) - place - 1):
            break
        widths[name], left = longest, left - longest
    return widths


def _show_lists(console: Any, rows: Sequence[Mapping[str, Any]], names: Sequence[str], title: str) -> None:
    from rich.text import Text

    if title:
        console.print(Text(printable(title), style="table.title"))
    for row in rows:
        for place, name in enumerate(names):
            indent = "" if place == 0 else "  "
            console.print(Text(f"{indent}{printable(name)}: {shown(row.get(name))}"), overflow="fold")


def _box() -> Any:
    from rich import box

    return box.SIMPLE_HEAD


def shown(value: object) -> str:
    """Returns a value as a cell: four significant digits, a dash for what is missing."""
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple | set | frozenset):
        return printable(", ".join(map(str, value))) or "–"
    return printable(str(value))
