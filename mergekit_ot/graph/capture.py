"""Capture of a module as a functional graph of aten operations, by `torch.export`."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mergekit_ot.errors import ArchitectureError


def capture(model: nn.Module, example_inputs: Tensor | tuple[object, ...]) -> ExportedProgram:
    """Returns the captured program of `model` in evaluation mode; the model itself is neither run nor changed.

    Args:
        model: Any module; it is copied first, so that nothing a forward leaves behind reaches it.
        example_inputs: A tensor or a tuple of positional inputs; a batch of one is doubled, since a size of one
            would hide the batch axis.

    Raises:
        ArchitectureError: `torch.export` cannot trace the module at these inputs.
    """
    inputs = doubled(as_inputs(example_inputs))
    try:
        with _quiet():
            instance = copy.deepcopy(model).eval()
            program = torch.export.export(instance, inputs, strict=False)
            return program.run_decompositions({})
    except Exception as error:
        raise ArchitectureError(
            f"'{type(model).__name__}' cannot be traced at inputs {describe(inputs)}: {first_line(error)}. "
            "Check the input shape (--input-shape, or example_inputs), and that forward has no branch on data."
        ) from error


def as_inputs(example_inputs: object) -> tuple[object, ...]:
    """Returns the inputs as a tuple of positional arguments."""
    return example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch.export from printing whole graphs when it fails."""
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
