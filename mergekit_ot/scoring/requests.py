"""What plugins that read data are asked: which file or folder, and for which network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mergekit_ot.errors import DataError
from mergekit_ot.progress import Notify


@dataclass(frozen=True)
class DataNeeds:
    """What is known of the network that data are read for.

    Attributes:
        network: An instance that is never run; its tensors may have no values.
        shape: Shape of one input without the batch axis, where the user or the checkpoint says it.
        folders: Folders of checkpoints, where a tokenizer may lie.
        notify: Told what was chosen.

    Example:
        >>> DataNeeds(nn.Conv2d(3, 8, 3), (3, 32, 32)).shape
        (3, 32, 32)
    """

    network: nn.Module | None = None
    shape: tuple[int, ...] | None = None
    folders: tuple[Path, ...] = ()
    notify: Notify = field(default=lambda text: None, repr=False)


@dataclass(frozen=True)
class DataRequest:
    """A file or a folder of data, as a SPEC names it.

    Attributes:
        path: It; it exists.
        options: The SPEC's query.
        split: ``test``, or ``train`` where data are for calibration.
        spec: The SPEC, for messages.

    Example:
        >>> request = DataRequest(Path("photos"), {"size": 32}, "test", "photos?size=32")
        >>> request.whole("size", 64), request.whole("batch", 64)
        (32, 64)
    """

    path: Path
    options: Mapping[str, Any] = field(default_factory=dict)
    split: str = "test"
    spec: str = ""

    def check_options(self, known: Iterable[str]) -> None:
        """Checks that the query holds nothing else.

        Raises:
            DataError: It does.
        """
        names = tuple(known)
        unknown = [key for key in self.options if key not in names]
        if unknown:
            raise DataError(
                f"Option '{unknown[0]}' of '{self.spec}' is not known. '{self.path.name}' takes: {', '.join(names)}."
            )

    def whole(self, key: str, default: int) -> int:
        """Returns a whole number above zero of the query.

        Raises:
            DataError: It is another value.
        """
        value = self.options.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DataError(f"{key}={value} of '{self.spec}': it is a whole number above zero.")
        return value

    def text(self, key: str) -> str | None:
        """Returns a value of the query as text, or None where it is not there."""
        value = self.options.get(key)
        return None if value is None else str(value)


# What a plugin returns: reads the data for a network, from the start at each call.
DataReader = Callable[[DataNeeds], Iterable[Tensor | tuple[Any, ...] | Mapping[str, Any]]]
