"""What the pickles of torch name, and the tensors that are made of it: over the file's bytes, and never beyond them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from mergekit_ot.errors import CheckpointError
from mergekit_ot.storage.limits import check_unfolded, shortened
from mergekit_ot.storage.pickled_arrays import HeldArray, array_makers
from mergekit_ot.storage.pickles import DamagedPickle, Maker, Named, hashed

# Names that a pickle of plain tensors, numbers and settings may hold; nothing of it is imported.
_DTYPES = r"b?float\w*|complex\w*|u?int\d+|bool|q\w+|bits\w+|half|double|long|short"
_LAYOUTS = r"strided|sparse_\w+|jagged|per_\w+|\w+_format|channels_last\w*"
_PLAIN = re.compile(
    rf"torch\.(cuda\.)?(Size|device|dtype|\w*Storage|\w*Tensor|{_DTYPES}|{_LAYOUTS})$"
    r"|torch\.(_utils\._rebuild_\w+|_tensor\._rebuild_\w+|serialization\._get_layout|nn\.parameter\.\w+)$"
    r"|torch\.storage\.\w+Storage$|collections\.(OrderedDict|Counter|defaultdict)$|_codecs\.encode$|argparse\.Namespace$"
    r"|numpy\.(dtype|ndarray|bool_?|float\d+|u?int\d+|dtypes\.\w+|_?core\.(multiarray\.(scalar|_reconstruct)|numeric\._frombuffer))$"
    r"|(builtins|__builtin__)\.(set|frozenset|list|dict|tuple|int|float|bool|str|bytes|bytearray|complex|slice|range)$"
)
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.qint8,
    "QInt32Storage": torch.qint32,
    "QUInt8Storage": torch.quint8,
    "QUInt4x2Storage": torch.quint4x2,
    "QUInt2x4Storage": torch.quint2x4,
}


@final
@dataclass(frozen=True, eq=False)
class Unusable:
    """A tensor or an array that is no dense tensor of numbers.

    Attributes:
        kind: What it is, with an article.
        advice: What to do with it.
    """

    kind: str
    advice: str


_SPARSE = Unusable("a sparse tensor", "Save it dense: tensor.to_dense().")
_META = Unusable("a tensor on the meta device, which has a shape and no values", "Save a model that was loaded.")
_NESTED = Unusable("a nested tensor", "Save its parts as tensors of their own.")
_QUANTISED = Unusable("a quantised tensor", "Dequantise it to float32, or use the original checkpoint.")
_SUBCLASS = Unusable("a tensor of a class of its own", "Save it as a plain tensor.")
_ARRAY = Unusable(
    "a NumPy array of what are no numbers of torch",
    "Save numbers: torch.save({name: torch.from_numpy(array), …}, path).",
)


def foreign_names(named: Mapping[str, object]) -> list[str]:
    """Returns the names beyond plain tensors, numbers and settings."""
    return [name for name in named if not _PLAIN.match(name)]


@final
@dataclass(frozen=True, eq=False)
class Memory:
    """The memory of one or more tensors.

    Attributes:
        data: Its bytes, in one dimension; None where they are not known yet.
        dtype: What they are.
    """

    data: Tensor | None
    dtype: torch.dtype


def storage_asked(key: object) -> tuple[torch.dtype, str, int, object]:
    """Returns type, key, numbers and view of the memory that a pickle asks for.

    Raises:
        DamagedPickle: It asks for none.
    """
    if not isinstance(key, tuple) or len(key) not in (5, 6) or key[0] not in ("storage", b"storage"):
        raise DamagedPickle("it keeps something outside of itself that is no memory of a tensor")
    kind, name, _, count = key[1:5]
    dtype = _STORAGES.get(kind.name.rpartition(".")[2]) if isinstance(kind, Named) else None
    if dtype is None or not isinstance(count, int) or count < 0 or not isinstance(name, str | int):
        raise DamagedPickle("memory of a tensor without a type, a key or a size")
    return dtype, str(name), count, key[5] if len(key) == 6 else None


def tensor_makers(where: str) -> dict[str, Maker]:
    """Returns what makes tensors of what the pickles of torch name.

    Args:
        where: Whose tensors they are, for messages.
    """

    def dense(memory: Memory, offset: int, size: object, stride: object, *_: object) -> Tensor | Unusable:
        metadata = _[-1] if len(_) > 2 else None
        return _with_bits(_dense(where, memory, memory.dtype, offset, size, stride), metadata)

    def retyped(memory: Memory, offset: int, size: object, stride: object, *rest: Any) -> Tensor | Unusable:
        dtype = _dtype_of(rest[2]) if len(rest) > 2 else None
        return _with_bits(_dense(where, memory, dtype, offset, size, stride), rest[3] if len(rest) > 3 else None)

    def typed(function: Named, _: object, arguments: tuple, *__: object) -> Any:
        return makers.get(function.name, lambda *_: _SUBCLASS)(*arguments)

    makers: dict[str, Maker] = {
        "torch._utils._rebuild_tensor": dense,
        "torch._utils._rebuild_tensor_v2": dense,
        "torch._utils._rebuild_tensor_v3": retyped,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        "torch._tensor._rebuild_from_type_v2": typed,
        "torch._tensor._rebuild_from_type": typed,
        "torch.Size": lambda sizes=(), *_: sizes,
        "collections.OrderedDict": _mapping,
        "collections.Counter": _mapping,
        "collections.defaultdict": lambda *_: {},
        **{f"torch._utils._rebuild_{kind}": made for kind, made in _UNUSABLE.items()},
        **array_makers(),
    }
    return makers


_UNUSABLE: dict[str, Callable[..., Unusable]] = {
    "sparse_tensor": lambda *_: _SPARSE,
    "sparse_csr_tensor": lambda *_: _SPARSE,
    "meta_tensor_no_storage": lambda *_: _META,
    "nested_tensor": lambda *_: _NESTED,
    "qtensor": lambda *_: _QUANTISED,
    "wrapper_subclass": lambda *_: _SUBCLASS,
    "device_tensor_from_numpy": lambda *_: _SUBCLASS,
    "device_tensor_from_cpu_tensor": lambda *_: _SUBCLASS,
}


def _mapping(pairs: object = ()) -> dict:
    if isinstance(pairs, dict):
        return pairs
    items = [pair for pair in pairs if isinstance(pair, list | tuple) and len(pair) == 2]  # type: ignore[union-attr]
    return {hashed(key): value for key, value in items}


def _dtype_of(named: object) -> torch.dtype | None:
    found = vars(torch).get(named.name.removeprefix("torch.")) if isinstance(named, Named) else None
    return found if isinstance(found, torch.dtype) else None


def _dense(
    where: str, memory: object, dtype: torch.dtype | None, offset: object, size: object, stride: object
) -> Tensor | Unusable:
    if not isinstance(memory, Memory) or dtype is None:
        raise DamagedPickle("a tensor without memory or type")
    if dtype in (torch.qint8, torch.qint32, torch.quint8, torch.quint4x2, torch.quint2x4):
        return _QUANTISED
    sizes, strides = _whole(size), _whole(stride)
    if sizes is None or strides is None or len(sizes) != len(strides) or not isinstance(offset, int) or offset < 0:
        raise DamagedPickle("a tensor whose shape is no list of whole numbers")
    if memory.data is None:
        return torch.empty(0, dtype=dtype)
    count = math.prod(sizes)
    reach = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True)) + 1 if count else 0
    if reach * dtype.itemsize > memory.data.numel():
        raise CheckpointError(
            f"{where} is damaged: a tensor of shape {_shape(sizes)} reaches beyond its memory of "
            f"{memory.data.numel()} bytes. Write or copy it again."
        )
    what = f"A tensor of shape {_shape(sizes)} in {where} repeats the same numbers, and unfolds to"
    check_unfolded(count * dtype.itemsize, memory.data.numel(), what)
    try:
        return torch.empty(0, dtype=dtype).set_(memory.data.untyped_storage(), offset, sizes, strides)
    except (RuntimeError, OverflowError) as failure:
        raise DamagedPickle(f"a tensor of shape {_shape(sizes)}") from failure


def _whole(numbers: object) -> tuple[int, ...] | None:
    if not isinstance(numbers, tuple | list) or len(numbers) > 64:
        return None
    is_whole = all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers)
    return tuple(numbers) if is_whole else None


def _shape(sizes: tuple[int, ...]) -> str:
    return "×".join(shortened(size, 24) for size in sizes[:8]) or "()"


def _with_bits(tensor: Tensor | Unusable, metadata: object) -> Tensor | Unusable:
    """Returns a tensor that is said to be the conjugate or the negative of what stands in memory."""
    if isinstance(tensor, Tensor) and isinstance(metadata, dict):
        if metadata.get("conj") is True and tensor.is_complex():
            tensor = tensor.conj().resolve_conj()
        if metadata.get("neg") is True:
            tensor = -tensor
    return tensor


def is_tensor(value: object) -> bool:
    """Returns whether a value is a tensor or an array, usable or not; packed weights are a tuple of such."""
    if isinstance(value, tuple | list):
        return any(isinstance(part, Unusable) for part in value[:16])
    return isinstance(value, Tensor | Unusable | HeldArray)


def tensor_in(value: object) -> Tensor | None:
    """Returns a tensor, or an array as one; None where a value is neither, or unusable."""
    return value.tensor if isinstance(value, HeldArray) else value if isinstance(value, Tensor) else None


def unusable_in(value: object) -> Unusable | None:
    """Returns what is unusable in a value of a state dict, or None."""
    if isinstance(value, tuple | list):
        return next((part for part in value[:16] if isinstance(part, Unusable)), None)
    if isinstance(value, HeldArray):
        return _ARRAY if value.tensor is None else None
    return value if isinstance(value, Unusable) else None
