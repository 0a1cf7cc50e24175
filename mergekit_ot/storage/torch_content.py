"""What stands in a file that torch.save wrote, as an archive or as pickles: read without calling what it names."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from mergekit_ot.errors import CheckpointError
from mergekit_ot.storage.archives import Archive
from mergekit_ot.storage.limits import PICKLE_BYTES, shortened
from mergekit_ot.storage.pickled_tensors import Memory, foreign_names, storage_asked, tensor_makers
from mergekit_ot.storage.pickles import DamagedPickle, PickleReader
from mergekit_ot.storage.regular import MappedFile, read_bounded

_ZIP_MAGIC = b"PK\x03\x04"
# What stands 22 bytes before the end of an archive without a comment.
_ARCHIVE_END = b"PK\x05\x06"
_PICKLE = "data.pkl"
# What a legacy file begins with: this number, pickled, and the version of the format.
_LEGACY_NUMBER, _LEGACY_VERSION = 0x1950A86A20F9469CFC6C, 1001
_LEGACY_BYTES = _LEGACY_NUMBER.to_bytes(10, "little")
_LEGACY_START = 64
_COUNT_BYTES = 8

# The first bytes of files that hold weights which cannot be read here, and the way out.
_OTHER_FORMATS = {
    b"GGUF": "It is a GGUF file: quantised weights for inference. Fuse the original (unquantised) checkpoints, "
    "then convert the fused one.",
    b"\x89HDF": "It is an HDF5 (Keras) file. Load it in its framework and save the weights as a PyTorch state dict.",
    **dict.fromkeys(
        (b"ggml", b"lmgg", b"fmgg", b"tjgg"),
        "It is a GGML file: quantised weights for inference. Fuse the original (unquantised) checkpoints, then "
        "convert the fused one.",
    ),
    b"\x93NUM": "It is one NumPy array. Save tensors by name: torch.save({'weight': torch.from_numpy(array)}, path).",
}
# Files of text that stand beside checkpoints, by the end of their names.
_OTHER_NAMES = {
    ".index.json": "It is the index of a checkpoint in several files (shards): a table of names, no weights. Join them "
    "into one file first, such as: model.save_pretrained(folder, max_shard_size='1TB').",
    ".json": "It is a JSON file, which holds no weights. Name the file of the weights beside it.",
    ".yaml": "It is a YAML file, which holds no weights. A recipe is given with --recipe.",
    ".yml": "It is a YAML file, which holds no weights. A recipe is given with --recipe.",
    ".onnx": "It is an ONNX file: a program for inference. Fuse the checkpoints that it was exported from, then "
    "export the fused one.",
    ".tflite": "It is a TensorFlow Lite file: a program for inference. Fuse the checkpoints that it was made from.",
    ".py": "It is Python code, which holds no weights. An architecture is given with --arch FILE:NAME.",
}
_RESAVE = (
    "It was not executed. If you trust it, load it in the code it was made with and re-save the weights alone: "
    "torch.save(model.state_dict(), 'weights.pt')."
)


def content_of(path: Path) -> object:
    """Returns what stands in a file of torch: plain data, tensors over the file, and stand-ins for what is neither.

    Raises:
        CheckpointError: The file is of another format, truncated or damaged, or it names code.
    """
    magic = read_bounded(path, len(_ZIP_MAGIC))
    if not magic:
        raise CheckpointError(f"'{path}' is empty: it was truncated while it was written or copied. Copy it again.")
    if magic in _OTHER_FORMATS:
        raise CheckpointError(f"'{path}' cannot be fused. {_OTHER_FORMATS[magic]}")
    return _in_archive(path) if magic == _ZIP_MAGIC else _in_pickles(path)


def is_bare_pickle(path: Path) -> bool:
    """Returns whether a file is a pickle that torch did not write."""
    start = read_bounded(path, _LEGACY_START)
    return not start.startswith(_ZIP_MAGIC) and _LEGACY_BYTES not in start


def _in_archive(path: Path) -> object:
    """Returns what stands in a file of the format that is an archive of a pickle and of memory."""
    with Archive(path) as archive:
        name = _pickle_in(path, archive)
        member, folder = archive.members[name], name.removesuffix(_PICKLE)
        PICKLE_BYTES.check(member.size, f"'{name}' in '{path}' has")
        order = f"{folder}byteorder"
        if order in archive.members and archive.read(order, 8).decode("ascii", "replace") != sys.byteorder:
            raise CheckpointError(
                f"'{path}' was written on a machine of another byte order. Load it with torch.load and save it again."
            )
        file = MappedFile(path)
        memories: dict[str, Memory] = {}

        def find(key: object) -> Memory:
            dtype, place, count, _ = storage_asked(key)
            if place not in memories:
                memories[place] = Memory(_memory_in(archive, file, f"{folder}data/{place}", count, dtype), dtype)
            return Memory(memories[place].data, dtype)

        return _read(path, io.BytesIO(archive.read(name)), find)


def _pickle_in(path: Path, archive: Archive) -> str:
    """Returns the name of the pickle in an archive, which says what the memory beside it is."""
    names = [name for name in archive.members if name.count("/") == 1 and name.endswith(f"/{_PICKLE}")]
    held = ", ".join(shortened(name, 40) for name in list(archive.members)[:6]) or "nothing"
    if any(name.endswith("/constants.pkl") for name in archive.members):
        raise CheckpointError(f"'{path}' is a TorchScript archive: a program, not a state dict. {_RESAVE}")
    if len(names) == 1:
        return names[0]
    if names:
        raise CheckpointError(f"'{path}' is damaged: it holds {len(names)} files {_PICKLE}. Write or copy it again.")
    raise CheckpointError(
        f"'{path}' is a zip archive, but not a PyTorch checkpoint: it holds no {_PICKLE}, but {held}. "
        "Expected a file written by torch.save(model.state_dict(), path)."
    )


def _memory_in(archive: Archive, file: MappedFile, name: str, count: int, dtype: torch.dtype) -> Tensor:
    member, wanted = archive.members.get(name), count * dtype.itemsize
    if member is None and wanted:
        raise CheckpointError(f"'{file.path}' is damaged: the memory '{shortened(name)}' is missing. Copy it again.")
    if member is None:
        return torch.empty(0, dtype=torch.uint8)
    if member.is_packed or member.size < wanted:
        why = "is compressed, which torch never does" if member.is_packed else "is shorter than its tensors"
        raise CheckpointError(f"'{file.path}' is damaged: the memory '{shortened(name)}' {why}. Write it again.")
    return _aligned(file, member.start, wanted, dtype)


def _aligned(file: MappedFile, start: int, count: int, dtype: torch.dtype) -> Tensor:
    """Returns bytes of a file, copied where they do not begin at a multiple of what they are."""
    memory = file.tensor(torch.uint8, (count,), start)
    return memory.clone() if start % dtype.itemsize else memory


def _in_pickles(path: Path) -> object:
    """Returns what stands in a legacy file: pickles, one after the other, and then memory."""
    most = PICKLE_BYTES.value
    stream = io.BytesIO(read_bounded(path, most))
    is_cut = path.stat().st_size > most
    dtypes: dict[str, torch.dtype] = {}

    def find(key: object) -> Memory:
        dtype, place, _, _ = storage_asked(key)
        dtypes.setdefault(place, dtype)
        return Memory(None, dtype)

    for expected in (_LEGACY_NUMBER, _LEGACY_VERSION):
        first = _read(path, stream, find, is_cut)
        if first != expected:
            # Clients that send arrays keep them in pickles of their own.
            if expected == _LEGACY_NUMBER and isinstance(first, Mapping | list | tuple):
                return first
            _refuse_other(path)
    _read(path, stream, find, is_cut)  # what machine it was written on
    start = stream.tell()
    _read(path, stream, find, is_cut)
    keys = _read(path, stream, find, is_cut)
    file = MappedFile(path)
    places = _places(file, stream.tell(), keys, dtypes)
    # Only now is it known where the memory stands of which the tensors are made.
    stream.seek(start)
    memories: dict[tuple, Memory] = {}

    def found(key: object) -> Memory:
        dtype, place, count, view = storage_asked(key)
        offset, size = (view[1], view[2]) if isinstance(view, tuple) and len(view) == 3 else (0, count)
        begin, whole = places.get(place, (0, 0))
        if not _is_within(offset, size, whole):
            raise DamagedPickle("a tensor beyond its memory")
        if (place, offset, size) not in memories:
            data = _aligned(file, begin + offset * dtype.itemsize, size * dtype.itemsize, dtype)
            memories[place, offset, size] = Memory(data, dtype)
        return memories[place, offset, size]

    return _read(path, stream, found, is_cut)


def _is_within(offset: object, size: object, whole: int) -> bool:
    return isinstance(offset, int) and isinstance(size, int) and 0 <= offset <= whole and 0 <= size <= whole - offset


def _places(
    file: MappedFile, start: int, keys: object, dtypes: Mapping[str, torch.dtype]
) -> dict[str, tuple[int, int]]:
    """Returns where the memory of each key begins, and how many numbers it has."""
    places: dict[str, tuple[int, int]] = {}
    for key in map(str, keys) if isinstance(keys, list) else ():
        count = int.from_bytes(file.read(start, _COUNT_BYTES), "little")
        start += _COUNT_BYTES
        size = count * dtypes[key].itemsize if key in dtypes else -1
        if size < 0 or start + size > file.size:
            raise CheckpointError(
                f"'{file.path}' is truncated: the file ends before its tensors do. Copy or download it again."
            )
        places[key] = (start, count)
        start += size
    return places


def _read(path: Path, stream: io.BytesIO, find: Callable[[object], Memory], is_cut: bool = False) -> object:
    """Returns what the next pickle holds.

    Raises:
        CheckpointError: It names code, or is damaged.
    """
    reader = PickleReader(stream, tensor_makers(f"'{path}'"), f"'{path}'")
    reader.find = find
    failure: DamagedPickle | None = None
    content = None
    try:
        content = reader.load()
    except DamagedPickle as damage:
        failure = damage
    foreign = foreign_names(reader.named)
    if foreign:
        wanted = ", ".join(shortened(name) for name in foreign[:4]) + (" …" if len(foreign) > 4 else "")
        raise CheckpointError(f"'{path}' carries code: its pickle wants to load {wanted}. {_RESAVE}") from failure
    if failure is not None:
        _refuse_damage(path, failure, is_cut)
    return content


def _ends_as_archive(path: Path) -> bool:
    with path.open("rb") as stream:
        stream.seek(-min(path.stat().st_size, len(_ARCHIVE_END) + 18), 2)
        return stream.read().startswith(_ARCHIVE_END)


def _refuse_damage(path: Path, failure: DamagedPickle, is_cut: bool) -> NoReturn:
    """Says what is wrong with a file that names nothing foreign and still cannot be read."""
    _refuse_by_name(path)
    said = str(failure)
    if any(word in said for word in ("exhausted", "expected", "not enough", "no newline")):
        if is_cut:
            PICKLE_BYTES.check(path.stat().st_size, f"The structure of '{path}' cannot be told from its memory; it has")
        if _ends_as_archive(path):
            raise CheckpointError(
                f"'{path}' is damaged: it ends as an archive of torch does, and does not begin as one. Copy or "
                "download it again."
            ) from failure
        raise CheckpointError(
            f"'{path}' is truncated: the file ends before its tensors do. Copy or download it again."
        ) from failure
    raise CheckpointError(
        f"'{path}' is not a PyTorch checkpoint, or it is damaged ({shortened(said, 200)}). "
        "Expected a file written by torch.save(model.state_dict(), path)."
    ) from failure


def _refuse_by_name(path: Path) -> None:
    for end, sentence in _OTHER_NAMES.items():
        if path.name.lower().endswith(end):
            raise CheckpointError(f"'{path}' is no checkpoint. {sentence}")
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"'{path}' was read by no plugin. Install the safetensors plugin, or see 'mergeot plugins'."
        )


def _refuse_other(path: Path) -> NoReturn:
    _refuse_by_name(path)
    raise CheckpointError(
        f"'{path}' is a pickle, but not a PyTorch checkpoint. Expected a file written by "
        "torch.save(model.state_dict(), path)."
    )
