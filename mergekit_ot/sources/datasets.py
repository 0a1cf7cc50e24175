"""Data SPECs: a callable, a file, a folder or a registered data set becomes batches of inputs and targets."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from mergekit_ot.errors import DataError
from mergekit_ot.hooks.formats import data_reader
from mergekit_ot.hooks.manager import default_manager
from mergekit_ot.scoring.batches import Batch, BatchReader, forward_arguments
from mergekit_ot.scoring.data_options import DataOptions
from mergekit_ot.scoring.requests import DataNeeds, DataReader, DataRequest
from mergekit_ot.sources.samples import batched
from mergekit_ot.sources.specs import Spec, call_with, find_object, parse_spec, registered
from mergekit_ot.storage.arrays import ArrayArchive
from mergekit_ot.storage.files import missing_file
from mergekit_ot.storage.limits import shortened
from mergekit_ot.storage.regular import check_regular

if TYPE_CHECKING:
    from mergekit_ot.hooks.manager import PluginManager

TEST = "test"
TRAIN = "train"
BATCH_SIZE = 500

_PAIRS = (("x", "y"), ("inputs", "targets"), ("images", "labels"), ("data", "labels"), ("data", "targets"))
_ALONE = ("x", "inputs", "images", "data", "arr_0")
# Files that nobody mistakes for the name of something registered.
_SUFFIXES = (".npz", ".npy", ".txt", ".csv", ".tsv", ".gz", ".arrow", ".parquet", ".json", ".jsonl")
_OPTIONS = ("split", "mean", "std", "batch", "limit", "layout")
_PAIR_HELP = (
    "A data SPEC gives an iterable of batches: tensors, (inputs, targets), or dictionaries with names of inputs."
)
_KINDS = "an .npz or .npy, a folder of images, a .txt, .csv or .tsv, a folder of datasets, or code (file.py:callable)"


@dataclass(frozen=True)
class DataSource:
    """Data that can be read from the start any number of times.

    Attributes:
        name: The SPEC.
        open: Returns a fresh iterable of batches.
        reader: Takes them apart into inputs and targets.
        open_for: Returns one for a network, where what is read depends on it; None where it does not.
    """

    name: str
    open: Callable[[], Iterable[Any]]
    reader: BatchReader = field(default_factory=BatchReader)
    open_for: DataReader | None = None

    def for_network(self, needs: DataNeeds, options: DataOptions) -> DataSource:
        """Returns the data as one network takes them.

        Args:
            needs: What is known of the network.
            options: Which entries of a batch are meant.
        """
        forward = BatchReader().forward if needs.network is None else forward_arguments(needs.network)
        reader = BatchReader(forward, options.input_key, options.label_key, f"data '{self.name}'", needs.notify)
        opened = self.open if self.open_for is None else functools.partial(self.open_for, needs)
        return DataSource(self.name, opened, reader)

    def __call__(self) -> Iterator[Batch]:
        """Returns the batches from the start, each as inputs and targets; a dictionary stays one for no network.

        Raises:
            DataError: Something in it holds no tensor, or it yields nothing.
        """
        return self._checked()

    def __iter__(self) -> Iterator[Batch]:
        return self._checked()

    def _checked(self) -> Iterator[Any]:
        count = 0
        for item in self.open():
            # Whoever runs a network on it knows which names it takes.
            is_open = isinstance(item, Mapping) and not (self.reader.forward.names or self.reader.input_key)
            yield item if is_open else self.reader.take(item, count)
            count += 1
        if count == 0:
            raise DataError(f"Data '{self.name}' has no batches. {_PAIR_HELP}")


def resolve_data(spec: str, manager: PluginManager | None = None, split: str = TEST) -> DataSource:
    """Finds the data that a SPEC names.

    Args:
        spec: ``file.npz``, another file or folder that a plugin reads, ``file.py:callable``, ``module:callable`` or a
            registered name, with a query. An archive takes ``split=train|test``, ``mean=``, ``std=``, ``batch=``,
            ``limit=`` and ``layout=raw`` (no channel axis is added or moved). The train part is read in a shuffled
            order, the same each time.
        manager: Whose registered data sets are known; the installed plugins by default.
        split: Part to take where the query does not say; a callable gets it if it has a ``split`` argument.

    Raises:
        DataError: It cannot be found, or it is neither an archive nor a callable nor an iterable.

    Example:
        >>> inputs, targets = next(iter(resolve_data("digits?batch=4")))
        >>> tuple(inputs.shape), tuple(targets.shape)
        ((4, 1, 8, 8), (4,))
    """
    parsed = parse_spec(spec)
    if parsed.name is None and parsed.place.endswith(".npz"):
        return _archive(parsed, split)
    table = registered(manager, "datasets")
    if parsed.name is None and parsed.place in table:
        found = table[parsed.place].load()
    elif parsed.name is None and _is_place(parsed):
        return _file(parsed, split, manager or default_manager())
    else:
        found = find_object(parsed, "data set", table, DataError)
    if isinstance(found, torch.utils.data.Dataset):
        return DataSource(spec, lambda: batched(found, split))
    if callable(found) and not _is_reiterable(found):
        return DataSource(spec, _opener(found, parsed, split))
    if _is_reiterable(found):
        return DataSource(spec, lambda: cast("Iterable[Any]", found))
    raise DataError(f"'{spec}' is a {type(found).__name__}. {_PAIR_HELP}")


def _is_place(spec: Spec) -> bool:
    """Whether a SPEC names a file or a folder of data, there or not."""
    path = Path(spec.place)
    return not spec.is_file and (path.exists() or "/" in spec.place or path.suffix.lower() in _SUFFIXES)


def _file(spec: Spec, split: str, manager: PluginManager) -> DataSource:
    """Returns the data in a file or a folder that a plugin reads."""
    path = Path(spec.place)
    if not path.exists():
        raise DataError(f"{missing_file(path, folders=True)} It was looked for as the data '{shortened(spec.text)}'.")
    check_regular(path, DataError)
    options = {key: value for key, value in spec.arguments.items() if key != "split"}
    request = DataRequest(path, options, str(spec.arguments.get("split", split)), spec.text)
    reader = data_reader(manager, request)
    if reader is None:
        raise DataError(f"What '{path}' holds is not known to be data. Name {_KINDS}; see 'mergeot docs data'.")
    return DataSource(spec.text, lambda: reader(DataNeeds()), open_for=reader)


def _is_reiterable(found: object) -> bool:
    return isinstance(found, Iterable) and not isinstance(found, Iterator | type)


def _opener(function: Callable[..., Any], spec: Spec, split: str) -> Callable[[], Iterable[Any]]:
    arguments = dict(spec.arguments)
    try:
        takes_split = "split" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        takes_split = False
    if takes_split:
        arguments.setdefault("split", split)

    def opened() -> Iterable[Any]:
        found = call_with(function, arguments, f"data '{spec.text}'", DataError)
        if isinstance(found, torch.utils.data.Dataset):
            return batched(found, split)
        if not isinstance(found, Iterable):
            raise DataError(f"Data '{spec.text}' returned a {type(found).__name__}. {_PAIR_HELP}")
        return found

    return opened


def _archive(spec: Spec, split: str) -> DataSource:
    path = Path(spec.place)
    if not path.exists():
        raise DataError(missing_file(path))
    check_regular(path, DataError)
    unknown = [key for key in spec.arguments if key not in _OPTIONS]
    if unknown:
        raise DataError(f"Option '{unknown[0]}' of '{spec.text}' is not known. An .npz takes: {', '.join(_OPTIONS)}.")
    options = spec.arguments
    part = str(options.get("split", split))
    if part not in (TEST, TRAIN):
        raise DataError(f"split={part} of '{spec.text}': it is {TRAIN} or {TEST}.")
    size = _positive(spec, "batch", BATCH_SIZE) or BATCH_SIZE
    limit = _positive(spec, "limit", None)

    @functools.cache
    def read() -> tuple[np.ndarray, np.ndarray | None]:
        return _read_pair(path, part, "split" in options)

    def opened() -> Iterator[Batch]:
        inputs, targets = read()
        # Archives are often sorted by class, and calibration takes only what comes first.
        order = np.random.default_rng(0).permutation(len(inputs))[:limit] if part == TRAIN else None
        count = len(inputs[:limit])
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count)) if order is None else order[start : start + size]
            yield _prepared(inputs[rows], options, spec), None if targets is None else _targets(targets[rows])

    return DataSource(spec.text, opened)


def _positive(spec: Spec, key: str, default: int | None) -> int | None:
    value = spec.arguments.get(key, default)
    if value is not None and (not isinstance(value, int) or value < 1):
        raise DataError(f"{key}={value} of '{spec.text}': it is a whole number above zero.")
    return value


def _read_pair(path: Path, part: str, is_demanded: bool) -> tuple[np.ndarray, np.ndarray | None]:
    with ArrayArchive(path) as archive:
        names = archive.names
        if len(names) == 1 and names[0].lower() in _ALONE:
            alone = archive.read(names[0])
            if alone.ndim == 0:
                raise DataError(f"'{path}' holds one number, and no inputs. Save an array with a row per example.")
            return alone, None
        chosen = _choose(names, part, is_demanded)
        if chosen is None:
            held = ", ".join(shortened(name) for name in names[:20]) or "nothing"
            raise DataError(f"'{path}' has no {part} part: it holds {held}. {_part_hint(names, part)}")
        inputs, targets = archive.read(chosen[0]), archive.read(chosen[1])
    if inputs.ndim == 0 or targets.ndim == 0 or len(inputs) != len(targets):
        raise DataError(
            f"'{path}' does not pair up: {chosen[0]} has shape {inputs.shape}, {chosen[1]} has {targets.shape}. "
            "Both need one entry per example along the first axis."
        )
    return inputs, targets


def _part_hint(names: list[str], part: str) -> str:
    others = [other for other in (TRAIN, TEST) if other != part and _choose(names, other, True)]
    if others:
        return f"Add ?split={others[0]} to take the {others[0]} part."
    return "Expected x_train, y_train, x_test, y_test, or one pair: x and y, inputs and targets, images and labels."


def _choose(names: list[str], part: str, is_demanded: bool) -> tuple[str, str] | None:
    by_lower = {name.lower(): name for name in names}
    forms = [(f"{x}_{part}", f"{y}_{part}") for x, y in _PAIRS] + [(f"{part}_{x}", f"{part}_{y}") for x, y in _PAIRS]
    has_parts = any(_is_part(name) for name in by_lower)
    if not is_demanded or not has_parts:
        forms += [*_PAIRS, ("arr_0", "arr_1")]
    return next(((by_lower[x], by_lower[y]) for x, y in forms if x in by_lower and y in by_lower), None)


def _is_part(name: str) -> bool:
    return any(name.startswith(f"{part}_") or name.endswith(f"_{part}") for part in (TRAIN, TEST))


def _prepared(array: np.ndarray, options: Mapping[str, Any], spec: Spec) -> Tensor:
    """Returns inputs as a model takes them: bytes as fractions, images with the channel axis first."""
    inputs = torch.from_numpy(np.ascontiguousarray(array))
    if inputs.dtype == torch.uint8:
        inputs = inputs.float() / 255
    elif inputs.dtype in (torch.float64, torch.bool):
        inputs = inputs.float()
    if options.get("layout") != "raw" and inputs.is_floating_point():
        if inputs.dim() == 3:
            inputs = inputs[:, None]  # [N, H, W] -> [N, 1, H, W]
        elif inputs.dim() == 4 and inputs.shape[3] in (1, 3) and inputs.shape[1] not in (1, 3):
            inputs = inputs.permute(0, 3, 1, 2).contiguous()  # [N, H, W, C] -> [N, C, H, W]
    for key in ("mean", "std"):
        if key in options:
            inputs = _scaled(inputs, options[key], key, spec)
    return inputs


def _scaled(inputs: Tensor, value: object, key: str, spec: Spec) -> Tensor:
    numbers = value if isinstance(value, tuple) else (value,)
    if not (inputs.is_floating_point() and _fit_channels(numbers, inputs)):
        raise DataError(
            f"{key}={value} of '{spec.text}' does not fit inputs of shape {tuple(inputs.shape[1:])}: "
            "give one number, or one per channel (separated by commas)."
        )
    if key == "std" and 0 in numbers:
        raise DataError(f"std={value} of '{spec.text}': it divides the inputs, so it cannot be zero.")
    scale = torch.tensor(numbers, dtype=inputs.dtype)
    if len(numbers) > 1:
        scale = scale.reshape(-1, *[1] * (inputs.dim() - 2))
    return inputs - scale if key == "mean" else inputs / scale


def _fit_channels(numbers: tuple[object, ...], inputs: Tensor) -> bool:
    """Whether these are numbers, one for all or one per channel."""
    if not all(isinstance(number, int | float) for number in numbers):
        return False
    return len(numbers) == 1 or (inputs.dim() >= 2 and len(numbers) == inputs.shape[1])


def _targets(array: np.ndarray) -> Tensor:
    targets = torch.from_numpy(np.ascontiguousarray(array))
    if targets.is_floating_point():
        return targets.float()
    if targets.dim() == 2 and targets.shape[1] == 1:
        targets = targets[:, 0]  # [N, 1] class numbers -> [N]
    return targets.long()
