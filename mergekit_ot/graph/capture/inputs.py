"""Example inputs, as a module is traced at them."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

# Random weights at so many random samples tell what a network does; a batch of calibration data would take long.
SAMPLES_OF_A_PROOF = 8


@runtime_checkable
class _FixedShapes(Protocol):
    """A module that says whether it is a program which holds at its own shapes only (read from a .pt2 file)."""

    has_fixed_shapes: bool


def as_inputs(example_inputs: object) -> tuple[object, ...]:
    """Returns the inputs as a tuple of positional arguments."""
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


def traced_inputs(model: nn.Module, example_inputs: object) -> tuple[object, ...]:
    """Returns the inputs at which a module is traced: a batch of one is doubled where the module takes other sizes."""
    inputs = as_inputs(example_inputs)
    return inputs if is_of_fixed_shapes(model) else doubled(inputs)


def is_of_fixed_shapes(model: nn.Module) -> bool:
    """Returns whether a module is a program that holds at its own shapes only."""
    return isinstance(model, _FixedShapes) and model.has_fixed_shapes


def doubled(inputs: tuple[object, ...]) -> tuple[object, ...]:
    """Returns the inputs with batches of one repeated."""
    if all(isinstance(x, Tensor) and x.ndim > 0 and x.shape[0] == 1 for x in inputs):
        return tuple(torch.cat([x, x]) for x in inputs)  # type: ignore[list-item]
    return inputs


def describe(inputs: tuple[object, ...]) -> str:
    """Returns the shapes of the inputs for a message."""
    return ", ".join(str(tuple(x.shape)) if isinstance(x, Tensor) else type(x).__name__ for x in inputs)


def first_line(error: BaseException) -> str:
    """Returns the first telling line of an error message, shortened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0][:200] if lines else type(error).__name__).rstrip(".")


def of_few_samples(inputs: tuple[object, ...], count: int = 2) -> tuple[object, ...]:
    """Returns inputs of a few samples, where all tensors hold the same number of them; else as they are.

    Args:
        inputs: Of a batch.
        count: Samples to keep.

    Example:
        >>> import torch
        >>> [part.shape[0] for part in of_few_samples((torch.zeros(64, 3), torch.zeros(64)))]
        [2, 2]
        >>> [part.shape[0] for part in of_few_samples((torch.zeros(64, 3), torch.zeros(5)))]
        [64, 5]
    """
    sizes = {part.shape[0] if part.ndim else 0 for part in inputs if isinstance(part, Tensor)}
    if len(sizes) != 1 or min(sizes) <= count:
        return inputs
    return tuple(part[:count] if isinstance(part, Tensor) else part for part in inputs)
