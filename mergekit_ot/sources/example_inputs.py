"""Inputs to trace a source by."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from mergekit_ot.errors import ArchitectureError
from mergekit_ot.sources.instances import on_meta
from mergekit_ot.sources.reading import ReadSource


def example_inputs_of(
    source: ReadSource,
    input_shape: tuple[int, ...] | None,
    data: Iterable | None,
    notify: Callable[[str], None],
) -> tuple[tuple[Tensor, ...], tuple[int, ...] | None]:
    """Returns inputs to trace a source by, and the shape of one input without the batch axis (None for a guess).

    In this order: the shape that is given, the checkpoint's own, the first batch of the data, and at last the first
    plausible shape that a fresh instance accepts.

    Raises:
        ArchitectureError: No shape is known, or the model does not accept it.
    """
    if source.checkpoint.example_inputs is not None and source.checkpoint.build is source.make.build:
        return source.checkpoint.example_inputs, None
    shape = input_shape or source.checkpoint.input_shape
    if shape is not None:
        return (_accepted(source, shape),), shape
    if data is not None:
        inputs = next(iter(data))[0]
        parts = tuple(part[:2].clone() for part in (inputs if isinstance(inputs, tuple) else (inputs,)))
        return parts, tuple(parts[0].shape[1:]) if len(parts) == 1 else None
    for shape in _plausible_shapes(on_meta(source.make)):
        for inputs in _inputs_of(source.make, shape):
            if refusal(source.make, inputs) is None:
                kind = "token numbers" if inputs.dtype == torch.int64 else "numbers"
                shown = ",".join(map(str, shape))
                notify(
                    f"No input shape was given: {shown} ({kind}) is the first plausible one that {source.make.name} "
                    f"accepts. If it is wrong, pass --input-shape."
                )
                return (inputs,), None
    raise ArchitectureError(
        f"No plausible input shape was accepted by '{source.make.name}'. Pass the shape of one input without the batch "
        "axis, such as --input-shape 1,28,28, or --data SPEC."
    )


def _accepted(source: ReadSource, shape: tuple[int, ...]) -> Tensor:
    reasons = []
    for inputs in _inputs_of(source.make, shape):
        reason = refusal(source.make, inputs)
        if reason is None:
            return inputs
        reasons.append(reason)
    shown = ",".join(map(str, shape))
    raise ArchitectureError(
        f"'{source.make.name}' does not accept inputs of shape {shown} (batch axis first, 2 of them): {reasons[0]}. "
        "Correct --input-shape; it is the shape of one input without the batch axis."
    )


def _inputs_of(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> list[Tensor]:
    """Candidates of one shape: numbers and token numbers, the likelier first."""
    tokens = next((m.num_embeddings for m in on_meta(make).modules() if isinstance(m, nn.Embedding)), None)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(2, *shape, generator=generator)
    if not tokens:
        return [numbers]
    return [torch.randint(tokens, (2, *shape), generator=generator), numbers]


def refusal(make: Callable[[], nn.Module], inputs: Tensor) -> str | None:
    """Returns why a fresh instance does not accept inputs, or None where it does."""
    reason = None
    for build, place in ((lambda: on_meta(make), "meta"), (make, "cpu")):
        try:
            module = build().eval()
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module(inputs.to(place))
            return None
        except Exception as failure:
            reason = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else 'no message'}"
    return reason


def _plausible_shapes(module: nn.Module) -> list[tuple[int, ...]]:
    sides = (28, 32, 64, 224, 8, 96, 128)
    shapes: list[tuple[int, ...]] = []
    first = next((m for m in module.modules() if isinstance(m, _FIRST_LAYERS)), None)
    if isinstance(first, nn.Linear):
        width = first.in_features
        shapes = [(width,), (16, width)]
        for channels in (1, 3):
            side = round((width / channels) ** 0.5)
            shapes += [(channels, side, side)] if channels * side * side == width else []
    elif isinstance(first, nn.Conv1d):
        shapes = [(first.in_channels, length) for length in (128, 1024, 150, 784, 16000)]
    elif isinstance(first, nn.Conv2d):
        shapes = [(first.in_channels, side, side) for side in sides]
    elif isinstance(first, nn.Conv3d):
        shapes = [(first.in_channels, side, side, side) for side in (16, 32, 64)]
    elif isinstance(first, nn.Embedding):
        shapes = [(16,), (128,), (200,)]
    elif isinstance(first, nn.RNNBase):
        shapes = [(16, first.input_size), (28, first.input_size)]
    elif isinstance(first, nn.BatchNorm2d):
        shapes = [(first.num_features, side, side) for side in sides]
    images = [(channels, side, side) for side in sides for channels in (1, 3)]
    return list(dict.fromkeys([*shapes, *images]))


_FIRST_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.RNNBase, nn.BatchNorm2d)
