"""Reads and writes exported programs."""

from __future__ import annotations

import contextlib
import io
import pickletools
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from mergekit_ot import Checkpoint, CheckpointError, MemoryStore, torch_stream

# What a pickle of plain tensors inside an exported program may name.
_PLAIN = ("torch.", "collections.OrderedDict", "_codecs.encode")
_UNSAFE = ("torch.load", "torch.hub", "torch.utils", "torch.serialization.load", "torch.package", "torch._dynamo")
_ZIP = b"PK\x03\x04"


def load(path: Path) -> Checkpoint:
    """Returns the state of an exported program together with what builds its module.

    Raises:
        CheckpointError: The file is damaged, or a pickle in it wants to load code.
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
        CheckpointError: No source is an exported program of these shapes.
    """
    template = metadata.get("template")
    if not template or Path(template).suffix != path.suffix:
        raise CheckpointError(
            f"A {path.suffix} file holds a program, and the source whose sizes the result takes is none. "
            "Choose another extension, such as .pt, or an exported program as the target."
        )
    program = _read(Path(template))
    for name, value in program.state_dict.items():
        with torch.no_grad():
            value.copy_(state[name])
    with _quiet(), torch_stream(path) as stream:
        torch.export.save(program, stream)


def _read(path: Path) -> ExportedProgram:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"'{path}' is not an exported program, or it is truncated. Write it with torch.export.save."
        )
    foreign = _foreign_in_archive(path)
    if foreign:
        raise CheckpointError(
            f"'{path}' carries code: a pickle in it wants to load {', '.join(sorted(set(foreign))[:4])}. It was not "
            "executed. Export the model again without custom objects."
        )
    try:
        with _quiet():
            return torch.export.load(path)
    except Exception as error:
        raise CheckpointError(
            f"'{path}' is not an exported program that this version of torch reads "
            f"({str(error).splitlines()[0][:200]}). Export it again with torch.export.save."
        ) from error


def _foreign_in_archive(archive: Path | io.BytesIO) -> list[str]:
    """Returns what the pickles in an archive want imported beyond plain tensors; nothing is executed."""
    foreign: list[str] = []
    with zipfile.ZipFile(archive) as opened:
        for member in opened.namelist():
            content = opened.read(member)
            if content.startswith(_ZIP) and zipfile.is_zipfile(io.BytesIO(content)):
                foreign += _foreign_in_archive(io.BytesIO(content))
            elif content.startswith(b"\x80"):
                foreign += [name for name in _globals_of(content) if _is_foreign(name)]
    return foreign


def _is_foreign(name: str) -> bool:
    return not name.startswith(_PLAIN) or name.startswith(_UNSAFE)


def _globals_of(pickled: bytes) -> list[str]:
    named: list[str] = []
    strings: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "GLOBAL":
                named.append(str(argument).replace(" ", "."))
            elif opcode.name == "STACK_GLOBAL":
                named.append(".".join(strings[-2:]))
            elif isinstance(argument, str):
                strings.append(argument)
    except Exception:
        return []  # raw numbers that happen to begin like a pickle
    return named


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
