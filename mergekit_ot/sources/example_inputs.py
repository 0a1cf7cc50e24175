"""Inputs to trace a source by."""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from mergekit_ot.errors import ArchitectureError, DataError
from mergekit_ot.fusion.architecture import KnownArchitecture, on_meta
from mergekit_ot.graph.capture.inputs import is_of_fixed_shapes
from mergekit_ot.progress import Notify
from mergekit_ot.scoring.batches import forward_arguments
from mergekit_ot.sources.bare import Holder
from mergekit_ot.sources.described import described_inputs
from mergekit_ot.sources.reading import ReadSource
from mergekit_ot.storage.limits import INPUT_NUMBERS, shortened

_TABLES = (nn.Embedding, nn.EmbeddingBag)
_FIRST_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TABLES, nn.RNNBase, nn.BatchNorm2d)
# So many inputs besides the first are guessed at most.
_MOST_FURTHER = 2
# A network of so many weights is run rather than followed without memory.
_SMALL = 1 << 20
_PRODUCTS = ("linear", "matmul", "__matmul__", "mm", "bmm", "addmm", "conv1d", "conv2d", "conv3d")
# Of images, the likelier first.
_SIDES = (28, 32, 64, 224, 8, 96, 128)


def example_inputs_of(
    source: ReadSource,
    input_shape: tuple[int, ...] | None,
    data: Iterable | None,
    notify: Notify,
    described: Sequence[str] = (),
) -> tuple[tuple[Tensor, ...], tuple[int, ...] | None]:
    """Returns inputs to trace a source by, and the shape of one input without the batch axis (None for a guess).

    In this order: those of a program that takes no others, what is described or the shape that is given, the
    checkpoint's own, the first batch of the data, the checkpoint's inputs, and at last the first plausible shape that a
    fresh instance accepts.

    Raises:
        ArchitectureError: No shape is known, or the model does not accept it.
    """
    if isinstance(source.known.outline, Holder):
        return (torch.zeros(2, 1),), input_shape
    own = source.checkpoint.example_inputs if source.checkpoint.build is source.make.build else None
    if own is not None and is_of_fixed_shapes(source.known.outline):
        return own, None
    if described:
        return _described(source, input_shape, described)
    shape = source.checkpoint.input_shape if input_shape is None else input_shape
    if shape is not None:
        if not shape:
            raise ArchitectureError(
                "The input shape is empty: give the shape of one input, such as --input-shape 1,28,28."
            )
        shown = ",".join(shortened(size, 24) for size in shape[:8])
        INPUT_NUMBERS.check(math.prod(shape), f"One input of the shape {shown} has", ArchitectureError)
        return _accepted(source, shape, notify), shape
    if data is not None:
        inputs = _first_rows(data)
        return inputs, tuple(inputs[0].shape[1:]) if len(inputs) == 1 else None
    return (_guessed(source, notify) if own is None else own), None


def _described(
    source: ReadSource, input_shape: tuple[int, ...] | None, described: Sequence[str]
) -> tuple[tuple[Tensor, ...], tuple[int, ...] | None]:
    """Returns inputs that the user describes, and the shape of one that is alone.

    Raises:
        ArchitectureError: A shape is given besides, or the model does not accept them.
    """
    if input_shape is not None:
        raise ArchitectureError(
            "--input and --input-shape both say what the input is. Leave --input-shape out, and describe every input "
            "with an --input of its own."
        )
    inputs = described_inputs(described, forward_arguments(source.known.outline))
    reason = refusal(source.known, inputs)
    if reason is not None:
        shown = " ".join(f"--input {shortened(text, 80)}" for text in described)
        raise ArchitectureError(
            f"'{source.make.name}' does not accept {shown}: {reason}. Correct them: a shape is that of one sample, "
            "without the batch axis, and tokens are whole numbers (ids=int:5000:16)."
        )
    is_alone = len(inputs) == 1 and inputs[0].is_floating_point() and inputs[0].ndim > 1
    return inputs, tuple(inputs[0].shape[1:]) if is_alone else None


def _first_rows(data: Iterable) -> tuple[Tensor, ...]:
    """Returns two rows of every input of the first batch.

    Raises:
        DataError: There is none.
    """
    first = next(iter(data), None)
    if first is None:
        raise DataError("The data hold no batch. Give some with --data, or --input-shape.")
    inputs = first[0]
    return tuple(values[:2].clone() for values in (inputs if isinstance(inputs, tuple) else (inputs,)))


def _guessed(source: ReadSource, notify: Notify) -> tuple[Tensor, ...]:
    """Returns inputs of the first plausible shape that a fresh instance accepts, and says so.

    Raises:
        ArchitectureError: It accepts none.
    """
    for shape in _plausible_shapes(source.known.outline):
        for inputs in _inputs_of(source.known.outline, shape):
            if refusal(source.known, inputs) is None:
                kind = "token numbers" if inputs[0].dtype == torch.int64 else "numbers"
                shown = ",".join(map(str, shape))
                notify(
                    f"No input shape was given: {shown} ({kind}) is the first plausible one that {source.make.name} "
                    f"accepts. If it is wrong, pass --input-shape."
                )
                _tell_further(source, inputs, notify)
                return inputs
    raise ArchitectureError(
        f"No plausible input shape was accepted by '{source.make.name}'. Pass the shape of one input without the batch "
        "axis, such as --input-shape 1,28,28, or --data SPEC."
    )


def _accepted(source: ReadSource, shape: tuple[int, ...], notify: Notify) -> tuple[Tensor, ...]:
    """Returns inputs of a shape that is given; those that forward takes besides are guessed, and it is said.

    Raises:
        ArchitectureError: The model does not accept them.
    """
    reasons = []
    for inputs in _inputs_of(source.known.outline, shape):
        reason = refusal(source.known, inputs)
        if reason is None:
            _tell_further(source, inputs, notify)
            return inputs
        reasons.append(reason)
    shown = ",".join(map(str, shape))
    further = further_inputs(source.known.outline)
    if further:
        raise ArchitectureError(
            f"'{source.make.name}' takes inputs besides the one that --input-shape {shown} describes "
            f"({', '.join(further)}), and none was found that it accepts with it: {reasons[0]}. Pass --data SPEC, "
            f"whose batches are ((first, {', '.join(further)}), targets). Or describe each, with "
            f"{' '.join(f'--input {name}=…' for name in further)} (mergeot docs data)."
        )
    raise ArchitectureError(
        f"'{source.make.name}' does not accept inputs of shape {shown} (batch axis first, 2 of them): {reasons[0]}. "
        "Correct --input-shape; it is the shape of one input without the batch axis."
    )


def further_inputs(module: nn.Module) -> list[str]:
    """Returns the names of the inputs that forward needs besides its first one.

    Example:
        >>> further_inputs(nn.Bilinear(2, 3, 4))
        ['input2']
    """
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return []
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [each for each in parameters if each.kind in positional and each.default is inspect.Parameter.empty]
    return [each.name for each in needed[1:]]


def _tell_further(source: ReadSource, inputs: tuple[Tensor, ...], notify: Notify) -> None:
    names = further_inputs(source.known.outline)
    for name, guess in zip(names, inputs[1:], strict=True):
        kind = "whole numbers" if guess.dtype == torch.int64 else "numbers"
        shape = ",".join(map(str, guess.shape[1:])) or "one each"
        notify(
            f"Input '{name}' of {source.make.name} was guessed: {kind}, {shape}. If it is wrong, pass --data SPEC, "
            f"whose batches are (inputs, targets) with a tuple of inputs, or --input {name}=… for every input."
        )


def _inputs_of(module: nn.Module, shape: tuple[int, ...]) -> list[tuple[Tensor, ...]]:
    """Candidates of one shape: numbers and token numbers, the likelier first; and of what forward takes besides."""
    tokens = next((m.num_embeddings for m in module.modules() if isinstance(m, _TABLES)), None)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(2, *shape, generator=generator)
    first = [torch.randint(tokens, (2, *shape), generator=generator), numbers] if tokens else [numbers]
    count = len(further_inputs(module))
    # Another of its kind, a number per sample (a time, a condition), a whole one (a step, a class, a length).
    further = [numbers, torch.rand(2, generator=generator), torch.ones(2, dtype=torch.int64), torch.rand(2, 1)]
    if tokens:
        further.insert(0, first[0])
    if count > _MOST_FURTHER:
        return [(each,) for each in first]
    return [(each, *others) for each in first for others in itertools.product(further, repeat=count)]


def refusal(known: KnownArchitecture, inputs: Tensor | tuple[Tensor, ...]) -> str | None:
    """Returns why a fresh instance does not accept inputs, or None where it does."""
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    reason = None
    # Where the constructor needs real tensors, an instance does so as well.
    places = ["cpu"] if known.is_real or _is_small(known.outline) else ["meta", "cpu"]
    for place in places:
        try:
            module = (known.built() if place == "cpu" else on_meta(known.built)).eval()
            looking = _OneKind() if place == "meta" else contextlib.nullcontext()
            with torch.no_grad(), warnings.catch_warnings(), looking:
                warnings.simplefilter("ignore")
                module(*[each.to(place) for each in given])
            return None
        except Exception as failure:
            reason = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else 'no message'}"
    return reason


class _OneKind(TorchFunctionMode):
    """Refuses products of whole numbers and others, which torch refuses too, but not where tensors have no memory."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.__name__ in _PRODUCTS:
            kinds = {each.dtype for each in args if isinstance(each, Tensor)}
            if len({kind.is_floating_point or kind.is_complex for kind in kinds}) > 1:
                raise RuntimeError(f"{func.__name__} of {' and '.join(sorted(map(str, kinds)))}")
        return func(*args, **(kwargs or {}))


def _is_small(module: nn.Module) -> bool:
    """Whether a run with memory costs less than what torch imports for a run without."""
    return sum(weight.numel() for weight in module.parameters() if not is_lazy(weight)) <= _SMALL


def _plausible_shapes(module: nn.Module) -> list[tuple[int, ...]]:
    """Returns shapes of one input, the likeliest first: those that the first layer suggests, then images."""
    shapes = _shapes_by_first_layer(module)
    for side in _SIDES:
        shapes += [(1, side, side), (3, side, side)]
    return list(dict.fromkeys(shapes))


def _shapes_by_first_layer(module: nn.Module) -> list[tuple[int, ...]]:
    match next((layer for layer in module.modules() if isinstance(layer, _FIRST_LAYERS)), None):
        case nn.Linear(in_features=width):
            return [(width,), (16, width), *_square_images(width)]
        case nn.Conv1d(in_channels=channels):
            return _cubes(channels, (128, 1024, 150, 784, 16000), 1)
        case nn.Conv2d(in_channels=channels) | nn.BatchNorm2d(num_features=channels):
            return _cubes(channels, _SIDES, 2)
        case nn.Conv3d(in_channels=channels):
            return _cubes(channels, (16, 32, 64), 3)
        case nn.Embedding() | nn.EmbeddingBag():
            return [(16,), (128,), (200,)]
        case nn.RNNBase(input_size=width):
            return [(16, width), (28, width)]
    return []


def _cubes(channels: int, sides: tuple[int, ...], dimensions: int) -> list[tuple[int, ...]]:
    return [(channels, *[side] * dimensions) for side in sides]


def _square_images(width: int) -> list[tuple[int, ...]]:
    """Returns the square images of one or three channels with so many values."""
    sides = {channels: round((width / channels) ** 0.5) for channels in (1, 3)}
    return [(channels, side, side) for channels, side in sides.items() if channels * side * side == width]
