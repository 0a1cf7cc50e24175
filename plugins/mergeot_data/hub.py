"""Folders that the `datasets` library saved (``save_to_disk``): tables of text, tokens, images and numbers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_ot import DataNeeds, DataReader, DataRequest
from mergekit_ot.errors import DataError, reason_of
from mergeot_data.folders import PARTS
from mergeot_data.images import IMAGE_OPTIONS, ImageForm
from mergeot_data.sequences import sequence_batches
from mergeot_data.values import needed, places
from mergeot_data.words import WORD_OPTIONS, encoder, length_of

_TEXTS = ("text", "sentence", "content", "review", "document", "prompt")
_LABELS = ("label", "labels", "fine_label", "target")


def hub_reader(request: DataRequest) -> DataReader:
    """Returns what reads a folder of `datasets`; its rows are read as they are needed.

    Raises:
        DataError: The library is missing, the folder damaged, or an option not known.
    """
    library = needed("datasets", f"A folder of datasets ('{request.path}')")
    request.check_options(dict.fromkeys(("text", "label", *WORD_OPTIONS, *IMAGE_OPTIONS)))
    try:
        found = library.load_from_disk(str(request.path))
    except Exception as failure:  # of a damaged folder, the library raises anything
        raise DataError(
            f"'{request.path}' cannot be read as a folder of datasets ({reason_of(failure)}). Save it anew with "
            "save_to_disk."
        ) from failure
    table = _part(request, found, library)
    for name, feature in table.features.items():
        # Pictures are decoded here, of kinds that hold pixels alone.
        if isinstance(feature, library.Image):
            table = table.cast_column(name, library.Image(decode=False))

    def read(needs: DataNeeds) -> Iterator[Any]:
        return _read(request, needs, table, library)

    return read


def _part(request: DataRequest, found: Any, library: Any) -> Any:
    if not isinstance(found, Mapping):
        return found
    for name in PARTS.get(request.split, (request.split,)):
        if name in found:
            return found[name]
    if len(found) == 1:
        return next(iter(found.values()))
    raise DataError(f"'{request.path}' has no {request.split} part: it has {', '.join(found)}. Add ?split=NAME.")


def _read(request: DataRequest, needs: DataNeeds, table: Any, library: Any) -> Iterator[Any]:
    columns = table.column_names
    label = request.text("label") or next((name for name in _LABELS if name in columns), None)
    text = request.text("text") or next((name for name in _TEXTS if name in columns), None)
    for chosen, key in ((label, "label"), (text, "text")):
        if chosen is not None and chosen not in columns:
            raise DataError(f"'{request.path}' has no column '{chosen}': it has {', '.join(columns)}. Correct ?{key}=.")
    pictures = [name for name, feature in table.features.items() if isinstance(feature, library.Image)]
    if pictures:
        yield from _images(request, needs, table, pictures[0], label)
    elif text is not None and "input_ids" not in columns:
        yield from _texts(request, needs, table, text, label)
    elif "input_ids" in columns and (label is None or not isinstance(table[0][label], list)):
        yield from _tokens(request, needs, table, label)
    else:
        for rows in places(len(table), request):
            yield from _numbers(table[list(rows)])


def _images(request: DataRequest, needs: DataNeeds, table: Any, column: str, label: str | None) -> Iterator[Any]:
    form: ImageForm | None = None
    for rows in places(len(table), request):
        found = table[list(rows)]
        contents = [_content(request, each) for each in found[column]]
        form = form or ImageForm(request, needs, contents[0])
        pixels = torch.stack([form.tensor(content) for content in contents])
        yield pixels, None if label is None else torch.tensor(found[label])


def _content(request: DataRequest, cell: Any) -> bytes:
    content = cell.get("bytes") if isinstance(cell, Mapping) else None
    if not isinstance(content, bytes):
        raise DataError(
            f"An image of '{request.path}' lies elsewhere, and is not in the folder. Save the data set with its images."
        )
    return content


def _texts(request: DataRequest, needs: DataNeeds, table: Any, text: str, label: str | None) -> Iterator[Any]:
    encode, length = encoder(request, needs, None), length_of(request, needs)

    def encoded() -> Iterator[tuple[list[int], int | None]]:
        for rows in places(len(table), request):
            found = table[list(rows)]
            labels = [None] * len(rows) if label is None else found[label]
            for words, number in zip(found[text], labels, strict=True):
                yield encode(words)[:length], number

    yield from sequence_batches(encoded(), request.whole("batch", 20), needs.network)


def _tokens(request: DataRequest, needs: DataNeeds, table: Any, label: str | None) -> Iterator[Any]:
    length = length_of(request, needs)

    def rows_of() -> Iterator[tuple[list[int], int | None]]:
        for rows in places(len(table), request):
            found = table[list(rows)]
            labels = [None] * len(rows) if label is None else found[label]
            for tokens, number in zip(found["input_ids"], labels, strict=True):
                yield list(tokens)[:length], number

    yield from sequence_batches(rows_of(), request.whole("batch", 20), needs.network)


def _numbers(found: Mapping[str, list[Any]]) -> Iterator[dict[str, Tensor]]:
    """Yields a batch of columns that hold numbers; rows of different lengths each for themselves."""
    plain = {name: values for name, values in found.items() if not isinstance(values[0], str | bytes | dict | None)}
    try:
        yield {name: torch.tensor(values) for name, values in plain.items()}
        return
    except (ValueError, TypeError):
        pass
    for place in range(len(next(iter(plain.values())))):
        yield {name: torch.tensor([values[place]]) for name, values in plain.items()}
