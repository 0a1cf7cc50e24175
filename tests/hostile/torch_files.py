"""Files that look like what torch.save writes: archives, pickles, and the tensors in them."""

from __future__ import annotations

import io
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hostile.case import Case, checkpoint, linear, raw

_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


def saved(content: object, legacy: bool = False) -> bytes:
    """Returns what torch.save writes."""
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=not legacy)
    return stream.getvalue()


def archive(members: Mapping[str, bytes], packed: tuple[str, ...] = ()) -> bytes:
    """Returns a zip archive."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for name, content in members.items():
            kind = zipfile.ZIP_DEFLATED if name in packed else zipfile.ZIP_STORED
            file.writestr(name, content, kind)
    return stream.getvalue()


def members_of(content: bytes) -> dict[str, bytes]:
    """Returns the files in an archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        return {name: file.read(name) for name in file.namelist()}


def pickled(pickle_bytes: bytes, memory: bytes = bytes(64)) -> bytes:
    """Returns an archive of torch with a pickle of one's own."""
    return archive({"a/data.pkl": pickle_bytes, "a/data/0": memory, "a/version": b"3\n"})


def changed(change: Callable[[dict[str, bytes]], object], packed: tuple[str, ...] = ()) -> bytes:
    """Returns a good archive of torch after a change of its files."""
    members = members_of(saved(linear()))
    change(members)
    return archive(members, packed)


def tensor(size: bytes, stride: bytes, offset: bytes = b"K\x00", count: bytes = b"K\x10") -> bytes:
    """Returns an archive with one tensor ``weight``; sizes are given as pickled tuples."""
    memory = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + count + b"tQ"
    made = _TENSOR + b"(" + memory + offset + size + stride + b"\x89}tR"
    return pickled(b"\x80\x02}X\x06\x00\x00\x00weight" + made + b"s.")


def flag_all_encrypted(content: bytes) -> bytes:
    """Returns an archive whose directory says that everything is encrypted."""
    data = bytearray(content)
    place = data.find(b"PK\x01\x02")
    while place >= 0:
        data[place + 8] |= 1
        place = data.find(b"PK\x01\x02", place + 1)
    return bytes(data)


def set_version(content: bytes) -> bytes:
    """Returns an archive that demands a version of zip that does not exist."""
    data = bytearray(content)
    data[data.find(b"PK\x01\x02") + 6] = 99
    return bytes(data)


def huge_directory() -> bytes:
    """Returns an archive that is nothing but a directory of 17 MiB."""
    size = 17 << 20
    directory = b"PK\x03\x04" + bytes(size - 4)
    return directory + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 9, 9, size, 0, 0)


def _twice(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(2):
            file.writestr("a/data.pkl", pickle.dumps({}, 2))


def _damaged_sum(path: Path) -> None:
    content = bytearray(saved({"weight": linear()["weight"], "note": "abc"}))
    content[content.find(b"abc")] = ord("x")
    path.write_bytes(content)


def _mapping_of_mappings() -> dict:
    inner: dict[str, Any] = {"x": 1}
    for _ in range(6):
        inner = {f"k{index}": inner for index in range(200)}
    return inner


def _holding_itself() -> dict:
    content: dict[str, Any] = {"epoch": 1}
    content["model"] = content
    return content


class _Runs:
    """Would touch a file if it were unpickled as usual."""

    def __init__(self, protocol: int) -> None:
        self.protocol = protocol

    def __reduce__(self) -> tuple[object, tuple[str]]:
        import os

        return os.system, ("touch executed",)


def _code(protocol: int) -> bytes:
    return pickle.dumps({"weight": 1, "hook": _Runs(protocol)}, protocol)


def _quantised() -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.ones(2, 3), 0.1, 0, torch.qint8)


def _quantised_layers() -> bytes:
    # As dynamic quantisation leaves them: the weights are packed, and only their scales are tensors.
    packed = "0._packed_params._packed_params"
    return saved({"0.scale": torch.tensor(1.0), "0.zero_point": torch.tensor(0), packed: (_quantised(), None)})


def _sparse_rows() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return saved({"weight": torch.ones(2, 3).to_sparse_csr()})


class _Own(torch.Tensor):
    """A tensor of a class of its own."""


def _torchscript(path: Path) -> None:
    members = {f"a/{name}": b"" for name in ("constants.pkl", "data.pkl", "code/__torch__.py")}
    path.write_bytes(archive(members))


def _sparse_file(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(1 << 40)


def _flipped() -> dict:
    state = linear()
    state["weight"][0, 1] = 0.5
    state["weight"].view(torch.int32)[0, 1] ^= 1 << 30
    return state


def _of_zeros(mebibytes: int, packed: tuple[str, ...] = ()) -> bytes:
    return archive({_PACKED[0]: bytes(mebibytes << 20)}, packed)


def _as_type(dtype: torch.dtype) -> bytes:
    return saved({name: value.to(dtype) for name, value in linear().items()})


def _with(name: str, content: bytes) -> bytes:
    return changed(lambda files: files.update({name: content}))


_DOUBLING = b"0c_codecs\nencode\nh\x00X\x03\x00\x00\x00hex\x86Rq\x00" * 60
_PACKED = ("a/data.pkl",)
_QUOTED = "'weight'"
_EXPECTED = "torch.save(model.state_dict(), path)"
TORCH_FILES: list[Case] = [
    checkpoint("empty file", raw(b""), "is empty"),
    checkpoint("text", raw(b"no checkpoint at all\n" * 9), "not a PyTorch checkpoint"),
    checkpoint("zeros", raw(bytes(1000)), "not a PyTorch checkpoint"),
    checkpoint("a terabyte of zeros", _sparse_file, "not a PyTorch checkpoint"),
    checkpoint("half an archive", raw(saved(linear())[:400]), "truncated"),
    checkpoint("half a legacy file", raw(saved(linear(), True)[:300]), "truncated"),
    checkpoint("legacy file without its last bytes", raw(saved(linear(), True)[:-5]), "truncated"),
    checkpoint("legacy memory of other sizes", raw(saved(linear(), True).replace(b"\x06" + bytes(7), b"\xff" * 8))),
    checkpoint("legacy file of another version", raw(saved(linear(), True).replace(b"M\xe9\x03", b"M\xe8\x03", 1))),
    checkpoint("first bytes of an archive alone", raw(b"PK\x03\x04" + bytes(300)), "truncated"),
    checkpoint("archive with other first bytes", raw(b"XXXX" + saved(linear())[4:])),
    checkpoint("checksum of the pickle", _damaged_sum, "checksum", "data.pkl"),
    checkpoint("zip version 9.9", raw(set_version(saved(linear()))), "version"),
    checkpoint("directory of 17 MiB", raw(huge_directory), "MERGEOT_MAX_HEADER_BYTES"),
    checkpoint("encrypted archive", raw(flag_all_encrypted(saved(linear()))), "encrypted"),
    checkpoint("archive of text", raw(archive({"a/b.txt": b"x"})), "no data.pkl", "a/b.txt"),
    checkpoint("two pickles", raw(_with("b/data.pkl", b".")), "2 files data.pkl"),
    checkpoint("one name twice", _twice, "same name"),
    checkpoint("pickle that unfolds", raw(lambda: _of_zeros(80, _PACKED)), "data.pkl", "80 MiB"),
    checkpoint("pickle as large as the limit", raw(lambda: _of_zeros(65)), "MERGEOT_MAX_PICKLE_BYTES"),
    checkpoint(
        "memory that is compressed",
        raw(changed(lambda files: None, ("archive/data/0",))),
        "archive/data/0",
        "compressed",
    ),
    checkpoint("memory that is missing", raw(changed(lambda files: files.pop("archive/data/0"))), "archive/data/0"),
    checkpoint("memory that is short", raw(_with("archive/data/0", b"x")), "archive/data/0"),
    checkpoint("another byte order", raw(_with("archive/byteorder", b"big")), "byte order"),
    checkpoint("tensor beyond its memory", raw(tensor(b"K\x64\x85", b"K\x01\x85")), "100", "beyond its memory"),
    checkpoint("tensor before its memory", raw(tensor(b"K\x01\x85", b"K\x01\x85", b"J\xff\xff\xff\xff"))),
    checkpoint("tensor that claims terabytes", raw(tensor(b"\x8a\x06" + bytes(5) + b"\x01\x85", b"K\x00\x85")), "TiB"),
    checkpoint("tensor of 2**70 numbers", raw(tensor(b"\x8a\x09" + bytes(8) + b"\x40\x85", b"K\x00\x85")), "EiB"),
    checkpoint("negative size", raw(tensor(b"J\xff\xff\xff\xff\x85", b"K\x01\x85"))),
    checkpoint("negative stride", raw(tensor(b"K\x02\x85", b"J\xff\xff\xff\xff\x85"))),
    checkpoint("text as size", raw(tensor(b"X\x01\x00\x00\x00a\x85", b"K\x01\x85"))),
    checkpoint("memory of a negative size", raw(tensor(b"K\x01\x85", b"K\x01\x85", count=b"J\xff\xff\xff\xff"))),
    checkpoint("too many steps", raw(pickled(b"\x80\x02" + b"]0" * 1_100_000 + b"].")), "MERGEOT_MAX_PICKLE_STEPS"),
    checkpoint(
        "lists nested deeply", raw(pickled(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".")), "no state dict"
    ),
    checkpoint("mappings of the same mapping", raw(saved(_mapping_of_mappings())), "no state dict"),
    checkpoint("mapping that holds itself", raw(saved(_holding_itself())), "no state dict", "epoch"),
    checkpoint("keys of one hash", raw(saved({index * (2**61 - 1): 0 for index in range(20_000)})), "no state dict"),
    checkpoint(
        "text that doubles",
        raw(pickled(b"\x80\x02X\x01\x00\x00\x00aq\x00" + _DOUBLING + b".")),
        "no state dict",
    ),
    checkpoint("memo of four billions", raw(pickled(b"\x80\x02]r\xff\xff\xff\xff.")), "no state dict"),
    checkpoint("number of 5,000 digits", raw(pickled(b"I" + b"9" * 5000 + b"\n.")), "digits"),
    checkpoint("stack that is empty", raw(pickled(b"\x80\x020."))),
    checkpoint("unknown step", raw(pickled(b"\x80\x02\xff."))),
    checkpoint("text that is no UTF-8", raw(pickled(b"\x80\x02X\x02\x00\x00\x00\xff\xfe."))),
    checkpoint("code, protocol 0", raw(_code(0)), "carries code", "system"),
    checkpoint("code, protocol 2", raw(_code(2)), "carries code", "system"),
    checkpoint("code, protocol 4", raw(_code(4)), "carries code", "system"),
    checkpoint("code in an archive", raw(pickled(_code(4))), "carries code", "system"),
    checkpoint("code as an instance", raw(pickled(b"(S'touch executed'\nios\nsystem\n.")), "carries code", "os.system"),
    checkpoint("code as an object", raw(pickled(b"(cos\nsystem\nS'touch executed'\no.")), "carries code", "os.system"),
    checkpoint("code after the end", raw(pickled(b"cbuiltins\neval\n")), "carries code", "builtins.eval"),
    checkpoint("tensor by torch.load", raw(pickled(b"ctorch.storage\n_load_from_bytes\n.")), "_load_from_bytes"),
    checkpoint("whole module", raw(saved(nn.Linear(3, 2))), "carries code", "Linear"),
    checkpoint("TorchScript", _torchscript, "TorchScript"),
    checkpoint("meta tensor", raw(saved({"weight": torch.empty(2, 3, device="meta")})), _QUOTED, "meta"),
    checkpoint("sparse tensor", raw(saved({"weight": torch.ones(2, 3).to_sparse()})), _QUOTED, "sparse"),
    checkpoint("sparse rows", raw(_sparse_rows), _QUOTED, "sparse"),
    checkpoint(
        "quantised tensor",
        raw(lambda: saved({"weight": _quantised()})),
        _QUOTED,
        "quantised",
    ),
    checkpoint("quantised layers", raw(_quantised_layers), "'0._packed_params._packed_params'", "quantised"),
    checkpoint("float8", raw(_as_type(torch.float8_e4m3fn)), _QUOTED, "float8"),
    checkpoint("tensor of a class", raw(saved({"weight": torch.ones(2, 3).as_subclass(_Own)})), "_Own"),
    checkpoint(
        "whole numbers as weights",
        raw(_as_type(torch.int64)),
        _QUOTED,
        "int64",
    ),
    checkpoint("booleans as weights", raw(_as_type(torch.bool)), _QUOTED, "bool"),
    checkpoint("NumPy objects", raw(saved({"weight": np.array([{}, {}])})), _QUOTED, "NumPy", "from_numpy"),
    checkpoint("NumPy texts", raw(saved({"weight": np.array(["a", "b"])})), _QUOTED, "NumPy", "from_numpy"),
    checkpoint("name of a megabyte", raw(saved({"w" * 1_000_000: torch.ones(2)})), "MERGEOT_MAX_NAME_LENGTH"),
    checkpoint("wrapper with a name of a megabyte", raw(saved({"e" * 1_000_000: 1, "model": {}})), "no state dict"),
    checkpoint("names that are numbers", raw(saved({1: torch.ones(2)})), "no state dict"),
    checkpoint("not a number", raw(saved({**linear(), "weight": torch.full((2, 3), torch.nan)})), _QUOTED, "6 of 6"),
    checkpoint("infinity", raw(saved({**linear(), "bias": torch.tensor([1.0, torch.inf])})), "'bias'", "1 of 2"),
    checkpoint("one bit of an exponent", raw(saved(_flipped())), _QUOTED, "1.7e+38"),
    checkpoint("other shape", raw(saved({**linear(), "weight": torch.ones(3, 3)})), _QUOTED, "3×3"),
    checkpoint("other names", raw(saved({"x": torch.ones(2)})), "weight", "x"),
    checkpoint("one tensor", raw(saved(torch.ones(2))), "no state dict", "tensor"),
    checkpoint("list of tensors", raw(saved([torch.ones(2)])), "no names", "1 tensor(s)"),
    checkpoint("nothing", raw(saved({})), "no state dict"),
    checkpoint("pickle of a dictionary", raw(pickle.dumps({"a": 1})), _EXPECTED),
    checkpoint("GGUF", raw(b"GGUF" + bytes(50)), "GGUF"),
    checkpoint("HDF5", raw(b"\x89HDF\r\n" + bytes(50)), "HDF5"),
    checkpoint("index of shards", raw(b'{"weight_map": {}}'), "index", end=".safetensors.index.json"),
    checkpoint("settings of a model", raw(b'{"hidden_size": 4}'), "JSON", end=".json"),
    checkpoint("recipe as a model", raw(b"models: [a, b]"), "--recipe", end=".yaml"),
    checkpoint("code as a model", raw(b"import torch\n"), "--arch", end=".py"),
]
