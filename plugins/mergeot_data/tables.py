"""Tables (``.csv``, ``.tsv``): a column of text, or columns of numbers, and perhaps one of labels."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from mergekit_ot import DataNeeds, DataReader, DataRequest
from mergekit_ot.errors import DataError, reason_of
from mergeot_data.folders import PARTS
from mergeot_data.sequences import sequence_batches
from mergeot_data.values import as_labels, label_numbers, places
from mergeot_data.words import WORD_OPTIONS, encoder, length_of, text_of

_TEXTS = ("text", "sentence", "content", "review", "document", "prompt")
_LABELS = ("label", "labels", "target", "class", "y")
_PART = "split"

Row = dict[str, str]


def table_reader(request: DataRequest) -> DataReader:
    """Returns what reads a table whose first line names the columns.

    A column ``split`` with ``train`` and ``test`` in it says which rows count.

    Raises:
        DataError: An option is not known.
    """
    request.check_options(("text", "label", *WORD_OPTIONS, "batch", "limit"))

    def read(needs: DataNeeds) -> Iterator[Any]:
        rows = _rows(request)
        columns = list(rows[0])
        label = _column(request, "label", columns, _LABELS)
        text = _column(request, "text", columns, _TEXTS)
        labels = None if label is None else [row[label] for row in rows]
        if text is not None:
            return _texts(request, needs, [row[text] for row in rows], labels)
        numbers = [column for column in columns if column not in (label, _PART)]
        return _numbers(request, needs, rows, numbers, labels)

    return read


def _rows(request: DataRequest) -> list[Row]:
    name = request.path.name.lower().removesuffix(".gz")
    content = io.StringIO(text_of(request.path), newline="")
    try:
        table = csv.DictReader(content, delimiter="\t" if name.endswith(".tsv") else ",", strict=True)
        rows = list(table)
    except csv.Error as failure:
        raise DataError(f"'{request.path}' is no table ({reason_of(failure)}). Save it as UTF-8 text.") from failure
    columns = [str(column) for column in table.fieldnames or ()]
    broken = next((place for place, row in enumerate(rows) if None in row or None in row.values()), None)
    if broken is not None:
        raise DataError(
            f"Row {broken + 1} of '{request.path}' (the names of columns not counted) has more or fewer than "
            f"{len(columns)} values. Its columns are {', '.join(columns[:20])}."
        )
    if _PART in columns:
        wanted = PARTS.get(request.split, (request.split,))
        found = [row for row in rows if row[_PART].lower() in wanted]
        if not found:
            held = ", ".join(sorted({row[_PART] for row in rows})[:20])
            raise DataError(f"'{request.path}' has no {request.split} part: its column 'split' has {held}.")
        return found
    if not rows:
        raise DataError(f"'{request.path}' has no row below the names of its columns.")
    return rows


def _column(request: DataRequest, key: str, columns: Sequence[str], usual: Sequence[str]) -> str | None:
    chosen = request.text(key)
    if chosen is None:
        return next((column for column in columns if column.lower() in usual), None)
    if chosen not in columns:
        raise DataError(
            f"'{request.path}' has no column '{chosen}': it has {', '.join(columns[:20])}. The first line names them; "
            f"correct ?{key}=."
        )
    return chosen


def _texts(request: DataRequest, needs: DataNeeds, texts: list[str], labels: list[str] | None) -> Iterator[Any]:
    encode, length = encoder(request, needs, "".join(texts)), length_of(request, needs)
    numbers = _told_labels(request, needs, labels)

    def encoded() -> Iterator[tuple[list[int], int | None]]:
        for rows in places(len(texts), request):
            known = [None] * len(rows) if labels is None else as_labels([labels[row] for row in rows], numbers).tolist()
            for row, label in zip(rows, known, strict=True):
                yield encode(texts[row])[:length], label

    yield from sequence_batches(encoded(), request.whole("batch", 20), needs.network)


def _numbers(
    request: DataRequest, needs: DataNeeds, rows: list[Row], columns: list[str], labels: list[str] | None
) -> Iterator[Any]:
    try:
        values = torch.tensor([[float(row[column]) for column in columns] for row in rows])
    except ValueError as failure:
        raise DataError(
            f"'{request.path}' has no column called text, and not all of {', '.join(columns[:20])} are numbers "
            f"({reason_of(failure)}). Say which column is the text (?text=COLUMN) and which the label (?label=COLUMN)."
        ) from failure
    numbers = _told_labels(request, needs, labels)
    for chosen in places(len(rows), request):
        yield values[chosen], None if labels is None else as_labels([labels[row] for row in chosen], numbers)


def _told_labels(request: DataRequest, needs: DataNeeds, labels: list[str] | None) -> dict[str, int] | None:
    """Returns the numbers of labels that are names, and says them."""
    numbers = None if labels is None else label_numbers(labels)
    if numbers is not None:
        shown = ", ".join(f"{name} = {number}" for name, number in list(numbers.items())[:20])
        needs.notify(f"Labels of '{request.spec}': {shown}.")
    return numbers
