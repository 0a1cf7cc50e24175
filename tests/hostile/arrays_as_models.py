"""Arrays given as models: archives of them, pickles of them, and files that describe what stands beside them."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hostile.arrays import header
from hostile.case import Case, checkpoint, linear, raw
from hostile.torch_files import archive, pickled, saved

_QUOTED = "'weight'"
_BIAS = header("(2,)", "'<f4'") + bytes(8)


def _npz(name: str, weight: bytes, *says: str) -> Case:
    return checkpoint(f"npz model: {name}", raw(archive({"weight.npy": weight, "bias.npy": _BIAS})), *says, end=".npz")


def _unfolding(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        with file.open("weight.npy", "w", force_zip64=True) as stream:
            stream.write(header("(86000, 1000)", "'<f4'"))
            for _ in range(344):
                stream.write(bytes(1_000_000))
        file.writestr("bias.npy", _BIAS)


def _array(shape: bytes, content: bytes, kind: bytes = b"f4", order: bytes = b"<") -> bytes:
    """Returns an archive of torch with one array of NumPy, spelled step by step."""
    made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"
    dtype = (
        b"cnumpy\ndtype\n(X\x02\x00\x00\x00"
        + kind
        + b"\x89\x88tR(K\x03X\x01\x00\x00\x00"
        + order
        + b"NNNJ\xff\xff\xff\xff"
    )
    dtype += b"J\xff\xff\xff\xffK\x00tb"
    state = b"(K\x01" + shape + dtype + b"\x89B" + len(content).to_bytes(4, "little") + content + b"tb"
    return pickled(b"\x80\x03}X\x06\x00\x00\x00weight" + made + state + b"s.")


def _shared(path: Path) -> None:
    """Writes two hundred arrays over the same 8 MiB, which would be 1.6 GiB if each had its own."""
    made = [f"{place}" for place in range(200)]
    body = b"\x80\x04}(X\x01\x00\x00\x00b" + b"B" + (8 << 20).to_bytes(4, "little") + bytes(8 << 20) + b"q\x07"
    for name in made:
        body += b"X" + len(name).to_bytes(4, "little") + name.encode()
        body += b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR"
        body += b"(K\x01(J\x00\x00\x20\x00tcnumpy\ndtype\n(X\x02\x00\x00\x00f4\x89\x88tR(K\x03X\x01\x00\x00\x00<NNN"
        body += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89h\x07tb"
    path.write_bytes(archive({"a/data.pkl": body + b"u.", "a/version": b"3\n"}))


def _described(name: str, says: str, **values: object) -> Case:
    def make(path: Path) -> None:
        path.write_bytes(saved(linear()))
        import hashlib

        content = {"made_by": "mergekit_ot 0", "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), **values}
        path.with_name("bad.pt.json").write_text(json.dumps(content))

    return checkpoint(f"described: {name}", make, says, arch=False)


def _plain(content: object) -> Callable[[Path], object]:
    return raw(pickle.dumps(content))


ARRAYS_AS_MODELS: list[Case] = [
    _npz("objects", header("(2, 3)", "'|O'") + pickle.dumps([{}]), _QUOTED, "Python objects"),
    _npz("text", header("(2,)", "'<U3'") + bytes(24), _QUOTED, "text"),
    _npz("29 terabytes", header("(4000000000000,)", "'<f4'"), _QUOTED, "damaged"),
    _npz("code in the header", header("(1,)", rest=", 'x': __import__('os').system('touch executed')"), _QUOTED),
    _npz("other shape", header("(3, 2)", "'<f4'") + bytes(24), _QUOTED, "3×2"),
    _npz("numbers of 16 bytes", header("(2, 3)", "'<f16'") + bytes(96), _QUOTED),
    checkpoint("npz model: unfolds to 328 MiB", _unfolding, "'weight.npy'", "MERGEOT_MAX_UNFOLDED_BYTES", end=".npz"),
    checkpoint("npz model: truncated", raw(archive({"weight.npy": _BIAS})[:-30]), "truncated", end=".npz"),
    checkpoint("npz model: name of a megabyte", raw(archive({"x" * 60_000 + ".npy": b"1"})), "MERGEOT", end=".npz"),
    checkpoint("array: fewer bytes than its shape", raw(_array(b"(K\x02K\x03t", bytes(20))), "20 bytes"),
    checkpoint("array: shape of huge sizes", raw(_array(b"(J\xff\xff\xff\x7fJ\xff\xff\xff\x7ft", b"")), "array"),
    checkpoint("array: negative shape", raw(_array(b"(J\xff\xff\xff\xfft", b"")), "no list of sizes"),
    checkpoint("array: true as a size", raw(_array(b"(\x88t", bytes(4))), "no list of sizes"),
    checkpoint("array: shape that is a number", raw(_array(b"K\x06", bytes(24))), "no list of sizes"),
    checkpoint("array: 70 axes", raw(_array(b"(" + b"K\x01" * 70 + b"t", bytes(4))), "no list of sizes"),
    checkpoint("array: unknown type", raw(_array(b"(K\x02K\x03t", bytes(24), b"O8")), _QUOTED, "NumPy"),
    checkpoint("array: two hundred over the same bytes", _shared, "Missing in the file"),
    checkpoint("array: never filled", raw(pickled(
        b"\x80\x03}X\x06\x00\x00\x00weightcnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btRs.")),
        _QUOTED, "NumPy"),
    checkpoint("pickle of an array", _plain(np.ones(3)), "torch.save(model.state_dict(), path)", end=".pkl"),
    checkpoint("pickle of arrays of objects", _plain({"weight": np.array([{}])}), _QUOTED, "NumPy", end=".pkl"),
    checkpoint("pickle of tensors", _plain({"weight": torch.ones(2, 3)}), "carries code", end=".pkl"),
    checkpoint("pickle of too few arrays", _plain([np.ones((2, 3), np.float32)]), "no names", end=".pkl"),
    _described("architecture that is a number", "'architecture'", architecture=5),
    _described("architecture that nobody knows", "no installed plugin", architecture="os.system"),
    _described("newer version", "newer version", version=99),
    _described("sizes of another network", "does not fit", architecture="mlp", arguments={"sizes": [3, 2]}),
]  # fmt: skip
