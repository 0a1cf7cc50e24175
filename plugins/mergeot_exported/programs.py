"""Reads and writes the programs of files that the user trusts: torch.export.load may run what stands in them."""

from __future__ import annotations

import contextlib
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mergekit_ot import Checkpoint, CheckpointError, MemoryStore, torch_stream

# Where an operation stood in the source code, with the folders of whoever exported it.
_SOURCE_FOLDER = re.compile(r'(?<=File ")[^"\n]*[/\\]')


def load_program(path: Path) -> Checkpoint:
    """Returns the state of an exported program together with what builds its module; the file must be trusted.

    Raises:
        CheckpointError: The file is damaged, or holds no example inputs.
    """
    program = _read(path)
    inputs, named = program.example_inputs or ((), {})
    if not inputs or named or not all(isinstance(value, Tensor) for value in inputs):
        raise CheckpointError(
            f"'{path}' holds no plain example inputs, and it is traced at those. Export it again with positional "
            "tensors: torch.export.export(model, (inputs,))."
        )
    state = {name: value.detach() for name, value in program.state_dict.items()}
    shapes = ", ".join("×".join(map(str, value.shape)) for value in inputs)
    return Checkpoint(
        path,
        MemoryStore(state),
        found=f"exported program with {len(state)} tensors, example inputs {shapes}",
        build=lambda: _module(program),
        example_inputs=tuple(inputs),
    )


def save(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Writes the program of the file named by ``template`` in `metadata` with the tensors in `state`.

    Raises:
        CheckpointError: No source that is trusted is an exported program.
    """
    template = metadata.get("template")
    if not template:
        raise CheckpointError(f"A {path.suffix} file holds a program, and there is none that is trusted to write on.")
    program = _read(Path(template))
    for name, value in program.state_dict.items():
        with torch.no_grad():
            value.copy_(state[name])
    _forget_folders(program)
    with _quiet(), torch_stream(path) as stream:
        torch.export.save(program, stream)


def _forget_folders(program: ExportedProgram) -> None:
    """Leaves of the places in source code, which a program keeps for messages, the names of the files alone."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            if node.meta.get("stack_trace"):
                node.meta["stack_trace"] = _SOURCE_FOLDER.sub("", node.meta["stack_trace"])


def _read(path: Path) -> ExportedProgram:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"'{path}' is not an exported program, or it is truncated. Write it with torch.export.save."
        )
    try:
        with _quiet():
            return torch.export.load(path)
    except Exception as error:
        raise CheckpointError(
            f"'{path}' is not an exported program that this version of torch reads "
            f"({str(error).splitlines()[0][:200]}). Export it again with torch.export.save."
        ) from error


def _module(program: ExportedProgram) -> nn.Module:
    """Returns the program as a module like any other: it can be copied, put into evaluation mode and given a state."""
    with _quiet():
        module = program.module()
    # The exported module forbids these by methods of its own; a program has one mode, so they do no harm.
    for name in ("train", "eval"):
        vars(module).pop(name, None)
    for name, value in list(vars(module).items()):
        if isinstance(value, Tensor):
            delattr(module, name)
            module.register_buffer(name, value, persistent=False)
    module.has_fixed_shapes = True  # type: ignore[assignment]
    return module


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
