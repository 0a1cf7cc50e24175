"""Text becomes numbers: by the characters of a vocabulary, or by a tokenizer that lies beside the model."""

from __future__ import annotations

import json
import string
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from mergekit_ot import DataNeeds, DataRequest
from mergekit_ot.errors import DataError, reason_of
from mergeot_data.values import needed

WORD_OPTIONS = ("vocabulary", "tokenizer", "length")
_TOKENIZER = "tokenizer.json"
# Orders of characters that go by a name.
_NAMED = {"printable": string.printable, "ascii": "".join(map(chr, range(128)))}
_LENGTH = 128
_MOST_BYTES = 1 << 26

Encode = Callable[[str], list[int]]


def encoder(request: DataRequest, needs: DataNeeds, text: str | None) -> Encode:
    """Returns what makes numbers of text.

    Args:
        request: Says ``vocabulary=`` (a file of characters in order, a JSON file, ``printable``, ``ascii`` or
            ``bytes``) or ``tokenizer=`` (a folder).
        needs: Whose folders may hold a tokenizer, and how many tokens the network knows.
        text: All of the text, whose characters are the vocabulary where nothing else is; None where that is not so.

    Raises:
        DataError: There is none, or it does not fit the network.
    """
    known = table_size(needs.network)
    chosen = request.text("vocabulary")
    if chosen == "bytes":
        return lambda words: list(words.encode("utf-8"))
    if chosen is not None:
        return _by_characters(_characters(chosen), known, f"vocabulary={chosen}", request)
    folder = request.text("tokenizer")
    folders = needs.folders if folder is None else (Path(folder),)
    found = next((place / _TOKENIZER for place in folders if (place / _TOKENIZER).is_file()), None)
    if found is not None:
        return _by_tokenizer(found, known, needs)
    characters = sorted(set(text)) if text is not None else []
    if folder is None and characters and known in (None, len(characters)):
        needs.notify(f"The vocabulary of '{request.spec}' is its {len(characters)} characters, sorted.")
        return _by_characters(characters, known, "the text", request)
    count = (
        ""
        if known is None
        else f" The network knows {known} tokens"
        + (f", and the text has {len(characters)} different characters." if characters else ".")
    )
    raise DataError(
        f"How the text of '{request.spec}' becomes tokens is not known: no {_TOKENIZER} lies beside the model, and no "
        f"vocabulary is given.{count} Add ?tokenizer=FOLDER, or ?vocabulary=FILE with the characters in order (or "
        "printable, ascii, bytes)."
    )


def table_size(network: nn.Module | None) -> int | None:
    """Returns how many tokens a network knows: the size of its first table."""
    layers = () if network is None else network.modules()
    tables = (layer.num_embeddings for layer in layers if isinstance(layer, nn.Embedding | nn.EmbeddingBag))
    return next(tables, None)


def length_of(request: DataRequest, needs: DataNeeds) -> int:
    """Returns how many tokens a sequence has at most: what is asked for, or what the network has positions for."""
    tables = {} if needs.network is None else dict(needs.network.named_modules())
    positions = [
        layer.num_embeddings
        for name, layer in tables.items()
        if isinstance(layer, nn.Embedding) and ("pos" in name.rpartition(".")[2].lower() or name.endswith("wpe"))
    ]
    own = needs.shape[0] if needs.shape is not None and len(needs.shape) == 1 else _LENGTH
    return request.whole("length", min([own, *positions]))


def _characters(chosen: str) -> Sequence[str]:
    """Returns the characters of a vocabulary in order.

    Raises:
        DataError: There is no such file, or it holds no list of characters.
    """
    if chosen in _NAMED:
        return _NAMED[chosen]
    path = Path(chosen)
    if not path.is_file():
        raise DataError(f"There is no vocabulary '{chosen}': it is a file, or one of {', '.join(_NAMED)} and bytes.")
    text = text_of(path)
    if path.suffix.lower() != ".json":
        return text
    try:
        content: Any = json.loads(text)
    except ValueError as failure:
        raise DataError(f"'{path}' is no valid JSON ({reason_of(failure)}).") from failure
    if isinstance(content, dict) and sorted(content.values()) == list(range(len(content))):
        content = sorted(content, key=content.__getitem__)
    if not isinstance(content, list | str) or not all(isinstance(each, str) and each for each in content):
        raise DataError(f"'{path}' is no vocabulary: give a list of characters, or characters and their numbers.")
    return content


def _by_characters(characters: Sequence[str], known: int | None, what: str, request: DataRequest) -> Encode:
    numbers: dict[str, int] = {}
    for place, character in enumerate(characters):
        numbers.setdefault(character, place)
    if known is not None and len(characters) > known:
        raise DataError(
            f"The network knows {known} tokens, and {what} has {len(characters)} characters ('{request.spec}'). Give "
            "the vocabulary that it was trained with: ?vocabulary=FILE."
        )

    def encode(words: str) -> list[int]:
        try:
            return [numbers[character] for character in words]
        except KeyError as missing:
            raise DataError(
                f"The character {missing.args[0]!r} of '{request.spec}' is not in {what}, which has {len(numbers)}. "
                "Give the vocabulary that the network was trained with: ?vocabulary=FILE."
            ) from missing

    return encode


def _by_tokenizer(path: Path, known: int | None, needs: DataNeeds) -> Encode:
    library = needed("tokenizers", f"A tokenizer ('{path}')")
    try:
        tokenizer = library.Tokenizer.from_file(str(path))
    except Exception as failure:  # the library raises nothing narrower
        raise DataError(f"'{path}' is no tokenizer, or damaged ({reason_of(failure)}).") from failure
    tokenizer.no_padding()
    tokenizer.no_truncation()
    count = tokenizer.get_vocab_size()
    if known is not None and count > known:
        raise DataError(
            f"The tokenizer '{path}' has {count} tokens, and the network knows {known}: it belongs to another network. "
            "Name the right one: ?tokenizer=FOLDER."
        )
    needs.notify(f"Text is read with the tokenizer '{path}'.")
    return lambda words: tokenizer.encode(words).ids


def text_of(path: Path) -> str:
    """Returns the text of a file, packed or not.

    Raises:
        DataError: It is no text, or larger than what is read at once.
    """
    import gzip

    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as stream:
            content = stream.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise DataError(
                f"'{path}' holds more than {_MOST_BYTES >> 20} MiB of text. Cut it: a fusion reads some thousand "
                "sequences."
            )
        return content.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as failure:
        raise DataError(f"'{path}' cannot be read as text ({reason_of(failure)}). Save it as UTF-8.") from failure
