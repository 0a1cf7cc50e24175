"""Archives of arrays given as data."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from hostile.case import Case, raw
from hostile.torch_files import archive, flag_all_encrypted, huge_directory

_COMMAND = ("eval", "GOOD", "--data", "FILE")


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    return stream.getvalue()


def header(shape: str, kind: str = "'<f8'", rest: str = "") -> bytes:
    """Returns the beginning of an array with a header of one's own."""
    text = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}{rest}}}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _case(name: str, content: bytes | Callable[[Path], object], *says: str, query: str = "") -> Case:
    make = raw(content) if isinstance(content, bytes) else content
    return Case(f"npz: {name}", "bad.npz", make, says, (*_COMMAND[:-1], f"FILE{query}"))


def _array(name: str, inputs: np.ndarray, *says: str) -> Case:
    return _case(name, _npz({"x": inputs, "y": np.zeros(len(inputs), np.int64)}), "'x'", *says)


def _headed(name: str, content: bytes, *says: str) -> Case:
    return _case(name, archive({"x.npy": content, "y.npy": content}), "'x'", *says)


def _unfolding(path: Path) -> None:
    # The zeros are packed in parts: a third of a gigabyte does not stand in memory.
    shape = (86_000, 1000)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open("x.npy", "w", force_zip64=True) as stream:
            stream.write(header(str(shape), "'<f4'"))
            for _ in range(344):
                stream.write(bytes(1_000_000))
        file.writestr("y.npy", header("(86000,)", "'|u1'") + bytes(86_000))


_PAIR = {"x": np.ones((4, 3), np.float32), "y": np.zeros(4, np.int64)}
_GOOD = _npz(_PAIR)
_DAMAGED = bytearray(_GOOD)
_DAMAGED[_DAMAGED.find(np.ones(3, np.float32).tobytes())] ^= 1
ARRAYS: list[Case] = [
    _case("empty file", b"", "bad.npz"),
    _case("text", b"x,y\n1,2\n", "bad.npz"),
    _case("without its end", _GOOD[:-30], "truncated"),
    _case("wrong checksum", bytes(_DAMAGED), "checksum"),
    _case("encrypted", flag_all_encrypted(_GOOD), "encrypted"),
    _case("directory of 17 MiB", raw(huge_directory), "MERGEOT_MAX_HEADER_BYTES"),
    _case("unfolds to 328 MiB", _unfolding, "'x.npy'", "MERGEOT_MAX_UNFOLDED_BYTES"),
    _case("member that is text", archive({"x": b"abc", "y": b"abc"}), "'x'", "no array"),
    _case("archive in an archive", archive({"x.npy": _GOOD, "y.npy": _GOOD}), "'x'"),
    _case("no pair", _npz({"a": np.ones(3)}), "no test part", "a"),
    _case("targets of another length", _npz({**_PAIR, "y": np.zeros(3)}), "does not pair up"),
    _case("a single number", _npz({"x": np.float64(1), "y": np.float64(1)}), "does not pair up"),
    _case("name of a megabyte", archive({"x" * 60_000 + ".npy": b"1"}), "no test part"),
    _array("objects", np.array([{}, {}]), "objects"),
    _array("text as inputs", np.array(["a", "b"]), "text"),
    _array("bytes as inputs", np.array([b"a", b"b"]), "text"),
    _array("dates", np.array(["2020-01-01"], "datetime64[D]"), "dates"),
    _array("spans of time", np.array([1, 2], "timedelta64[s]"), "spans of time"),
    _array("records", np.zeros(2, [("a", "f4")]), "records"),
    _array("numbers of 16 bytes", np.ones(2, np.longdouble), "float128"),
    _headed("29 terabytes", header("(4000000000000,)"), "damaged"),
    _headed("negative shape", header("(-1,)")),
    _headed("true as a size", header("(True,)", "'|u1'") + b"x"),
    _headed("size of 5,000 digits", header("(" + "9" * 5000 + ",)")),
    _headed("70 axes", header("(" + "1," * 70 + ")") + bytes(8)),
    _headed("code in the header", header("(1,)", rest=", 'x': __import__('os').system('touch executed')")),
    _headed("header that is nested", header("(" * 4000)),
    _headed("header of 20,000 bytes", header("(1,)", rest="," + " " * 20_000)),
    _headed("no header", b"\x93NUMPY\x01\x00"),
    _headed("version 9", b"\x93NUMPY\x09\x09" + bytes(20)),
    _headed("pickle", b"\x80\x04cos\nsystem\n."),
    _case("unknown option", _GOOD, "'batches'", query="?batches=1"),
    _case("batch that is no number", _GOOD, "batch=x", query="?batch=x"),
    _case("mean that fits no channels", _GOOD, "mean", query="?mean=1,2,3,4,5"),
]
