"""What the sources of a fusion say about the data that are read for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from mergekit_ot.progress import Notify
from mergekit_ot.scoring.data_options import DataOptions
from mergekit_ot.scoring.requests import DataNeeds
from mergekit_ot.sources.reading import ReadSource


class _Asked(Protocol):
    """What says the shape of an input, and which entries of a batch are meant."""

    @property
    def input_shape(self) -> tuple[int, ...] | None: ...

    @property
    def input_key(self) -> str | None: ...

    @property
    def label_key(self) -> str | None: ...


def needs_of(sources: Sequence[ReadSource], asked: _Asked, notify: Notify) -> tuple[DataNeeds, DataOptions]:
    """Returns what `DataSource.for_network` takes.

    Args:
        sources: Those that the data are read for; the first is what data are fitted to.
        asked: What the user says.
        notify: Told what was chosen.
    """
    first = sources[0]
    shape = asked.input_shape or first.checkpoint.input_shape
    examples = first.checkpoint.example_inputs
    if shape is None and examples is not None and len(examples) == 1 and examples[0].is_floating_point():
        shape = tuple(examples[0].shape[1:])
    paths = [Path(source.checkpoint.path) for source in sources]
    folders = dict.fromkeys(path if path.is_dir() else path.parent for path in paths)
    needs = DataNeeds(first.known.outline, shape, tuple(folders), _once(notify))
    return needs, DataOptions(input_key=asked.input_key, label_key=asked.label_key)


def _once(notify: Notify) -> Notify:
    """Returns what tells every sentence once, however often data are read."""
    told: set[str] = set()

    def tell(text: str) -> None:
        if text not in told:
            told.add(text)
            notify(text)

    return tell
