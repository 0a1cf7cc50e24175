"""Small YAML files of settings: read within limits, and without what YAML allows and settings do not need."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import yaml

from mergekit_ot.errors import MergeotError
from mergekit_ot.storage.files import missing_file
from mergekit_ot.storage.limits import RECIPE_BYTES, RECIPE_DEPTH, RECIPE_VALUES, shortened
from mergekit_ot.storage.regular import check_regular, read_bounded

# A question mark where a list in brackets goes on unquoted: YAML takes it for a key.
_UNQUOTED = re.compile(r"[\[,]\s*[^\s'\"\[\],]*\?")
_INSIDE = {
    "while parsing a flow sequence": "the list in brackets",
    "while parsing a flow mapping": "the keys in braces",
    "while parsing a block collection": "the list",
    "while parsing a block mapping": "the keys",
}
_TEXT_TAG = "tag:yaml.org,2002:str"
# What the parser raises for texts that are no YAML, and for numbers and dates that are none.
_DAMAGE = (yaml.YAMLError, ValueError, OverflowError, RecursionError, TypeError, LookupError, AttributeError)


@dataclass(frozen=True)
class YamlFile:
    """What stands in a YAML file, and in which lines.

    Attributes:
        path: The file.
        content: Mappings with text as keys, lists, texts, numbers, booleans, None.
        lines: Keys and places of lists on the way to a value → its line, from 1; of a value in a mapping, its key's.
    """

    path: Path
    content: Any
    lines: Mapping[tuple[str | int, ...], int]

    def where(self, *way: str | int) -> str:
        """Returns where a value stands, or the nearest that it is in: "line 3 of 'run.yml'"."""
        known = next((way[:count] for count in range(len(way), 0, -1) if way[:count] in self.lines), ())
        return f"line {self.lines.get(known, 1)} of '{self.path}'"


def read_yaml(path: Path, error: type[MergeotError]) -> YamlFile:
    """Returns what stands in a YAML file, with the line of every value.

    Raises:
        MergeotError: It is missing, no YAML, over a limit, or holds a tag, a key twice, or a key that is no text.
    """
    if not path.exists():
        raise error(missing_file(path))
    check_regular(path, error)
    most = RECIPE_BYTES.value
    content = read_bounded(path, most + 1, error)
    if len(content) > most:
        RECIPE_BYTES.check(max(path.stat().st_size, len(content)), f"'{path}' has", error)
    try:
        text = content.decode("utf-8-sig")
        _Events(path, error).check(text)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return YamlFile(path, None, {})
        _check_keys(root, path, error)
        return YamlFile(path, yaml.SafeLoader("").construct_document(root), dict(_lines(root)))
    except _DAMAGE as failure:
        said = shortened(_said(failure), 300)
        if "set_int_max_str_digits" in said:  # advice for whoever wrote a program, not a file
            said = "a whole number has thousands of digits"
        hint = _hint(content.decode("utf-8", "replace"))
        raise error(f"'{path}' is not valid YAML: {said}.{hint}") from failure


def _said(failure: Exception) -> str:
    """Returns what a parser says, with the lines that it means."""
    if not isinstance(failure, yaml.MarkedYAMLError):
        return " ".join(str(failure).split())
    opened, found = failure.context_mark, failure.problem_mark
    problem = failure.problem or failure.context or "it cannot be read"
    here = f"line {found.line + 1}: " if found is not None else ""
    if opened is None:
        return f"{here}{problem}"
    if "quoted scalar" in (failure.context or ""):
        return f"line {opened.line + 1}: a quote is opened and not closed"
    inside = _INSIDE.get(failure.context or "", "what")
    return f"{here}{problem} (in {inside} that begins in line {opened.line + 1})"


def _lines(root: yaml.Node) -> Iterator[tuple[tuple[str | int, ...], int]]:
    """Yields the way to every value and its line; what several places refer to is told at each."""
    waiting: list[tuple[tuple[str | int, ...], yaml.Node]] = [((), root)]
    while waiting:
        way, node = waiting.pop()
        if isinstance(node, yaml.SequenceNode):
            inner = [((*way, place), part, part) for place, part in enumerate(node.value)]
        elif isinstance(node, yaml.MappingNode):
            inner = [((*way, str(key.value)), key, value) for key, value in node.value]
        else:
            continue
        for path, marked, value in inner:
            yield path, marked.start_mark.line + 1
            waiting.append((path, value))


def _hint(text: str) -> str:
    if _UNQUOTED.search(text):
        return " A SPEC with '?' in a list must stand in quotes: [\"nets.py:net?h=3\"]."
    return " YAML is indented by blanks, not by tabs." if "\t" in text else ""


@final
class _Events:
    """Counts values and depth as a file is parsed, references unfolded, before anything is built of it."""

    def __init__(self, path: Path, error: type[MergeotError]) -> None:
        self._path, self._error = path, error
        self._count = 0
        self._sizes: dict[str, int] = {}
        self._open: list[tuple[str | None, int]] = []

    def check(self, text: str) -> None:
        """Goes through a text.

        Raises:
            MergeotError: It holds too much, or a tag, or refers to what is not complete.
        """
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if isinstance(event, yaml.AliasEvent):
                self._refer(event.anchor)
            elif isinstance(event, yaml.ScalarEvent | yaml.CollectionStartEvent):
                self._begin(event)
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, begin = self._open.pop()
                if anchor is not None:
                    self._sizes[anchor] = self._count - begin + 1
            RECIPE_VALUES.check(self._count, f"'{self._path}' holds, with its references unfolded,", self._error)
            RECIPE_DEPTH.check(len(self._open), f"'{self._path}' is nested by", self._error)

    def _refer(self, anchor: str) -> None:
        if anchor not in self._sizes:
            shown = shortened(anchor)
            raise self._error(f"'{self._path}' refers to '*{shown}', which is not complete there. Write it out.")
        self._count += self._sizes[anchor]

    def _begin(self, event: yaml.ScalarEvent | yaml.CollectionStartEvent) -> None:
        self._count += 1
        if event.tag is not None:
            where = f"in line {event.start_mark.line + 1}"
            raise self._error(f"'{self._path}' has the tag '{shortened(event.tag)}' {where}: tags are not allowed.")
        if isinstance(event, yaml.CollectionStartEvent):
            self._open.append((event.anchor, self._count))
        elif event.anchor is not None:
            self._sizes[event.anchor] = 1


def _check_keys(root: yaml.Node, path: Path, error: type[MergeotError]) -> None:
    for node in _nodes(root):
        if not isinstance(node, yaml.MappingNode):
            continue
        seen: set[str] = set()
        for key, _ in node.value:
            where = f"in line {key.start_mark.line + 1} of '{path}'"
            if not isinstance(key, yaml.ScalarNode) or key.tag != _TEXT_TAG:
                shown = shortened(key.value) if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
                raise error(f"Key {shown} {where} is no text. Keys are names, such as 'solver'; quote others.")
            if key.value in seen:
                raise error(f"Key '{shortened(key.value)}' {where} is there twice. Delete one of the two.")
            seen.add(key.value)


def _nodes(root: yaml.Node) -> Iterator[yaml.Node]:
    """Yields every node once, those that several places refer to as well."""
    waiting, seen = [root], {id(root)}
    while waiting:
        node = waiting.pop()
        yield node
        inner: list[yaml.Node] = []
        if isinstance(node, yaml.SequenceNode):
            inner = list(node.value)
        elif isinstance(node, yaml.MappingNode):
            inner = [part for pair in node.value for part in pair]
        fresh = [part for part in inner if id(part) not in seen]
        seen.update(map(id, fresh))
        waiting += fresh
