"""Text that comes from files and names, made fit to be shown: on a terminal, in Markdown."""

from __future__ import annotations

import re

# Longer ones are no names that anybody reads.
_LONGEST_WORD, _LONGEST_TEXT = 500, 6000
_WORD = re.compile(rf"\S{{{_LONGEST_WORD + 1},}}")
# What means something in Markdown wherever it stands; an underscore inside a word does not.
_MARKS = re.compile(r"[\\`*\[\]<>|~&$#@]|(?<![^\W_])_|_(?![^\W_])|(?<=:)/(?=/)|(?<=www)\.", re.IGNORECASE)


def printable(text: str) -> str:
    r"""Returns text as it may be shown on a terminal: on one line, of readable length, and nothing in it acts.

    Characters that are not printed (control characters, ends of lines, changes of direction, bytes that are no text)
    become what Python writes for them; of very long names and messages the middle is left out.

    Example:
        >>> print(printable("weight\x1b[2J\u202e\n"))
        weight\x1b[2J\u202e\n
        >>> len(printable("w" * 10_000_000)) < 500
        True
    """
    return visible(_WORD.sub(lambda word: _shortened(word[0], _LONGEST_WORD), _shortened(text, _LONGEST_TEXT)))


def visible(text: str) -> str:
    """Returns text in which every character that is not printed is what Python writes for it."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)


def as_markdown(text: str) -> str:
    """Returns text that Markdown shows as it is, on one line."""
    return _MARKS.sub(lambda mark: f"\\{mark[0]}", printable(text))


def _shortened(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    start, end = longest // 2, longest // 4
    return f"{text[:start]}…({len(text) - start - end}-more)…{text[-end:]}"
