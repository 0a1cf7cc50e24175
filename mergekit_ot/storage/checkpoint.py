"""Checkpoints: read any plain state dict safely, write one that says how it was made.

A file written here holds plain data only: tensors, numbers, strings, lists and mappings. What it names (a registered
architecture) is looked up among the installed plugins; no code is taken out of a file, but for the program of one that
the user trusts.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_ot.errors import CheckpointError
from mergekit_ot.storage.array_files import read_arrays
from mergekit_ot.storage.files import check_is_file, check_readable
from mergekit_ot.storage.folders import replacing_folder
from mergekit_ot.storage.forms import goes_into_folder
from mergekit_ot.storage.limits import shortened
from mergekit_ot.storage.marks import mark_archive
from mergekit_ot.storage.record import Checkpoint
from mergekit_ot.storage.regular import check_regular
from mergekit_ot.storage.replacing import replacing
from mergekit_ot.storage.side_files import described, form_of, side_file, side_text
from mergekit_ot.storage.state_dicts import narrow_name, quantised_name
from mergekit_ot.storage.store import compacted, write_all
from mergekit_ot.storage.torch_format import TorchWriter, read_torch_file

# Formats in the order in which they are asked: each reads a path, or writes a state with its metadata to one, and says
# so; what none of them takes is a file of torch.
Loader = Callable[[Path], Checkpoint | None]
# What ends a file's name, other than the version that may end that of a model.
_SUFFIX = re.compile(r"\.[a-z]\w*")
Saver = Callable[[Path, Mapping[str, Tensor], Mapping[str, Any]], bool | None]


def load(path: Path, formats: Sequence[Loader], state_key: str | None = None) -> Checkpoint:
    """Reads a checkpoint; of what ``torch.save`` writes, nothing is executed.

    Args:
        path: The file, or the folder of a format that has several files.
        formats: Asked first, in order; then it is an archive of arrays, or what ``torch.save`` writes. They know
            whether the file is trusted.
        state_key: Which of several state dicts in the file is meant; None takes the likeliest.

    Raises:
        CheckpointError: The file is missing, truncated, carries code, is quantised, or holds no tensor.
    """
    # A name that no file here can have may be one that a format knows how to find.
    may_be_found = len(path.parts) == 2 and not os.path.lexists(path.parent) and not _SUFFIX.fullmatch(path.suffix)
    if not may_be_found:
        check_readable(path)
        check_regular(path)
    asked = (read(path) for read in formats)
    checkpoint = next((content for content in asked if content is not None), None)
    if checkpoint is None:
        check_readable(path)
        check_regular(path)
        check_is_file(path)
        checkpoint = read_arrays(path) or read_torch_file(path)
    checkpoint = described(_under(checkpoint, state_key))
    check_types(checkpoint)
    return checkpoint


def _under(checkpoint: Checkpoint, state_key: str | None) -> Checkpoint:
    if state_key is None or state_key == checkpoint.key:
        return checkpoint
    if state_key in checkpoint.alternatives:
        return checkpoint.alternatives[state_key]()
    if not checkpoint.key and not checkpoint.alternatives:
        return checkpoint  # it holds one state dict and nothing around it: nothing else can be meant
    keys = [key or "(the top level)" for key in (checkpoint.key, *checkpoint.alternatives)]
    held = f"{', '.join(map(repr, keys[:8]))}{' …' if len(keys) > 8 else ''}"
    raise CheckpointError(
        f"'{checkpoint.path}' has no state dict under the key '{shortened(state_key)}'. It has one under: {held}. Give "
        "--state-key one of these, or leave it out."
    )


def check_types(checkpoint: Checkpoint) -> None:
    """Checks that the numbers of a checkpoint can be averaged.

    Raises:
        CheckpointError: They are quantised, or of a type in which nothing can be computed.
    """
    path = checkpoint.path
    damaged = quantised_name(checkpoint.state)
    if damaged is not None:
        raise CheckpointError(
            f"'{path}' holds quantised weights ('{damaged}'): packed integers cannot be averaged. "
            "Dequantise it to float32 with the tool that made it, or use the original checkpoint."
        )
    narrow = narrow_name(checkpoint.state)
    if narrow is not None:
        kind = str(checkpoint.state.dtype(narrow)).removeprefix("torch.")
        raise CheckpointError(
            f"'{narrow}' in '{path}' is of the type {kind}, in which nothing can be computed. "
            "Convert it to bfloat16 or float32 with the tool that made it."
        )


def save(
    path: Path,
    state: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    formats: Sequence[Saver],
    template: Checkpoint | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a state and its metadata, beside the place first, then renamed into it.

    Args:
        path: Where to.
        state: Name → tensor.
        metadata: Plain data: what the file says about the state.
        formats: Asked first, in order; then it is in the form of the template, or a PyTorch file of mergeot's own.
        template: The checkpoint to which the state belongs: it gives the form, and a program to formats that need
            one. They are told its file only where its program was read, which it is where the user trusts it.
        overwrite: Whether a file that mergeot did not write may be replaced.

    Raises:
        CheckpointError: The folder does not exist or cannot be written, or the metadata is not plain data.
    """
    compact = {name: compacted(value) for name, value in state.items() if isinstance(value, Tensor)}
    for key, value in metadata.items():
        _check_plain(value, key)
    if template is not None and template.form is not None and goes_into_folder(path, template.form):
        with replacing_folder(path, metadata, overwrite=overwrite) as folder:
            template.form.write(folder, compact, metadata)
        return
    program = None if template is None or template.build is None else str(template.path)
    known = {**metadata, "template": program}
    form = form_of(path, template)
    with contextlib.ExitStack() as stack:
        beside = stack.enter_context(replacing(path, overwrite=overwrite))
        is_by_name = form is None or not form.suits(path)
        if is_by_name and any(write(beside, compact, known) for write in formats):
            mark_archive(beside)
            return
        if form is None:
            write_all(compact, TorchWriter(beside, metadata))
            return
        form.write(beside, compact, metadata)
        mark_archive(beside)
        if not form.has_room(path):
            # What describes a file is in its place before the file is.
            described_in = stack.enter_context(replacing(side_file(path), overwrite=overwrite))
            described_in.write_text(side_text(beside, metadata), encoding="utf-8")


def _check_plain(value: object, where: str) -> None:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            _check_plain(key, f"{where} key")
            _check_plain(inner, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for inner in value:
            _check_plain(inner, where)
    elif value is not None and not isinstance(value, str | int | float | bool):
        raise CheckpointError(
            f"Cannot save '{where}': a {type(value).__name__} is not plain data. "
            "Use numbers, strings, booleans, None, lists and mappings of these."
        )
