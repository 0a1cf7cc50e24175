"""What a module is apart from its weights, as a value: equal descriptions mean that one trace serves both modules."""

from __future__ import annotations

import enum
import functools
import hashlib
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mergekit_ot.graph.capture.copying import recomputed_names
from mergekit_ot.graph.capture.module_state import tied_names

# Lists of weights and of their names that recurrent modules keep beside their parameters.
_DERIVED = frozenset({"_all_weights", "_flat_weights", "_flat_weights_names", "_flat_weight_refs"})
# Where a configuration was read from, and by which version; no forward depends on it.
_PROVENANCE = frozenset({"name_or_path", "_name_or_path", "_commit_hash", "transformers_version"})
# What every module holds, besides its tensors and submodules, that changes what a call computes.
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_OF_EVERY_MODULE = frozenset(nn.Module().__dict__)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis))
_NAMED = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
_SEQUENCES = (tuple, list, deque)
_SETS = (set, frozenset)
_MAPPINGS = (dict, OrderedDict, types.MappingProxyType)
# Values of this many entries are compared at most; larger ones count by identity.
_MOST_ENTRIES = 1 << 22
_MOST_ITEMS = 1 << 14
_DEEPEST = 40
# So many different objects are looked into; a network that refers to more refers to everything.
_MOST_OBJECTS = 1 << 15
# Two of these that are equal are the same to every code; of others it matters whether they are one object.
_WITHOUT_IDENTITY = (tuple, frozenset, np.generic, enum.Enum)


class Undescribed(Exception):
    """A value of which nothing says whether another one equals it."""


@dataclass(frozen=True, eq=False)
class ModuleDescription:
    """A module as a value.

    Attributes:
        form: Nested tuples of names, numbers, classes and code objects.
        unknown: Values that only count by identity, kept so that no other takes their place in memory.
    """

    form: tuple[object, ...]
    unknown: tuple[object, ...]

    def is_same(self, other: ModuleDescription) -> bool:
        """Whether two modules differ in the values of their weights at most."""
        return self.form == other.form


def described_module(model: nn.Module) -> ModuleDescription:
    """Returns what a module is apart from the values of what its state dict holds.

    Whatever cannot be compared by value counts by identity: then two modules are the same only if they share it.
    """
    describer = _Describer(model)
    return ModuleDescription(describer.module(), tuple(describer.unknown))


def described_value(value: object) -> object:
    """Returns the description of a value that belongs to no module.

    Raises:
        Undescribed: It can be told from others by identity only.
    """
    describer = _Describer(nn.Module())
    form = describer.value(value)
    if describer.unknown:
        raise Undescribed(type(describer.unknown[0]).__name__)
    return form


class _Describer:
    """Describes the values that one module refers to; what it refers to twice is described once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.unknown: list[object] = []
        self._paths = {id(module): path for path, module in model.named_modules()}
        named = [*model.named_parameters(), *model.named_buffers()]
        self._tensors = {id(tensor): name for name, tensor in named}
        self._seen: dict[int, tuple[int, object]] = {}
        self._depth = 0

    def module(self) -> tuple[object, ...]:
        """Returns the description of the module."""
        model, saved = self.model, self.model.state_dict(keep_vars=True).keys()
        parameters = [(name, tuple(each.shape), each.dtype) for name, each in model.named_parameters()]
        buffers = [(name, tuple(each.shape), each.dtype) for name, each in model.named_buffers()]
        # What stands in no file may decide what is free, so it must be the same.
        unsaved = [(name, self._tensor_values(each)) for name, each in model.named_buffers() if name not in saved]
        inner = [(path, type(each), self._settings(each)) for path, each in model.named_modules()]
        tied = tuple(tied_names(model).items())
        return (tuple(parameters), tuple(buffers), tuple(unsaved), tied, tuple(inner))

    def _settings(self, module: nn.Module) -> tuple[object, ...]:
        """Returns what a module is set to, apart from its tensors and submodules."""
        held = vars(module)
        # A weight that a hook computes anew before every forward is no setting.
        skipped = _OF_EVERY_MODULE | _DERIVED | _PROVENANCE | recomputed_names(module)
        settings = [(name, self.value(held[name])) for name in sorted(held.keys() - skipped)]
        # Hooks stand under numbers that count all hooks of the process.
        hooks = [(name, *map(self.value, held[name].values())) for name in _HOOKS if held.get(name)]
        return (*settings, *hooks)

    def value(self, value: object) -> object:
        """Returns a value's description."""
        if isinstance(value, _PLAIN) and type(value) in _PLAIN:
            return (type(value).__name__, repr(value))
        if isinstance(value, _NAMED):
            return (type(value).__name__, str(value))
        if isinstance(value, type):
            return value
        if not isinstance(value, _WITHOUT_IDENTITY):
            known = self._seen.get(id(value))
            if known is not None:
                return ("again", known[0])
            # The value is kept, so that its address stays its own.
            self._seen[id(value)] = len(self._seen), value
        self._depth += 1
        try:
            if self._depth > _DEEPEST or len(self._seen) > _MOST_OBJECTS:
                raise Undescribed
            return self._object(value)
        except Undescribed:
            self.unknown.append(value)
            return ("identity", id(value))
        finally:
            self._depth -= 1

    def _object(self, value: Any) -> object:
        for kinds, describe in _WAYS:
            if isinstance(value, kinds):
                return describe(self, value)
        return self._state_of(value)

    def _module(self, value: nn.Module) -> object:
        if id(value) in self._paths:
            return ("module", self._paths[id(value)])
        raise Undescribed

    def _tensor(self, value: Tensor) -> object:
        if id(value) in self._tensors:
            return ("tensor of", self._tensors[id(value)])
        return self._tensor_values(value)

    def _tensor_values(self, value: Tensor) -> object:
        kind = ("tensor", type(value), tuple(value.shape), value.dtype, str(value.device))
        if value.is_meta:
            return kind
        if value.layout is not torch.strided or value.is_quantized or value.numel() > _MOST_ENTRIES:
            self.unknown.append(value)
            return (*kind, id(value))
        try:
            raw = value.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
            return (*kind, _digest(raw.view(torch.uint8).numpy() if raw.numel() else b""))
        except RuntimeError:  # a subclass without memory of its own
            self.unknown.append(value)
            return (*kind, id(value))

    def _array(self, value: np.ndarray) -> object:
        if value.dtype.hasobject or value.size > _MOST_ENTRIES:
            raise Undescribed
        return ("array", value.dtype.str, value.shape, _digest(value.tobytes()))

    def _number(self, value: np.generic) -> object:
        return ("number", value.dtype.str, value.tobytes())

    def _member(self, value: enum.Enum) -> object:
        return ("member", type(value), value.name)

    def _sequence(self, value: Any) -> object:
        _check_count(value)
        return (type(value), *map(self.value, value)) if type(value) in _SEQUENCES else self._state_of(value)

    def _set(self, value: Any) -> object:
        _check_count(value)
        if type(value) not in _SETS or not all(type(item) in _PLAIN for item in value):
            raise Undescribed  # the order of anything else is not the same in each process
        return (type(value), *sorted(map(self.value, value), key=repr))

    def _mapping(self, value: Any) -> object:
        _check_count(value)
        return (type(value), *self._pairs(value)) if type(value) in _MAPPINGS else self._state_of(value)

    def _pairs(self, value: Mapping[Any, Any]) -> tuple[object, ...]:
        return tuple((self.value(key), self.value(item)) for key, item in value.items() if key not in _PROVENANCE)

    def _partial(self, value: functools.partial) -> object:
        return ("partial", *map(self.value, (value.func, value.args, value.keywords)))

    def _method(self, value: types.MethodType) -> object:
        return ("method", self.value(value.__self__), self.value(value.__func__))

    def _builtin(self, value: types.BuiltinFunctionType) -> object:
        owner = value.__self__
        if isinstance(owner, types.ModuleType) or owner is None:
            return ("builtin", value.__module__ or "", value.__qualname__)
        if isinstance(owner, type):
            return ("builtin", owner, value.__qualname__)
        raise Undescribed

    def _function(self, value: types.FunctionType) -> object:
        cells = []
        for cell in value.__closure__ or ():
            try:
                cells.append(self.value(cell.cell_contents))
            except ValueError:
                cells.append("empty")
        defaults = (self.value(value.__defaults__), self._pairs(value.__kwdefaults__ or {}))
        return ("function", value.__module__, value.__qualname__, value.__code__, defaults, tuple(cells))

    def _operation(self, value: object) -> object:
        return ("operation", str(value))

    def _state_of(self, value: Any) -> object:
        """Returns an object's class with its attributes, and its items where it is a list or a mapping as well.

        Only where its class lets it be copied in the plain way: then that is all there is to it.
        """
        kind: Any = type(value)
        is_plain = kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__
        # Bare objects stand for themselves.
        if not is_plain or kind is object or kind.__getstate__ is not object.__getstate__:  # type: ignore[attr-defined]
            raise Undescribed
        try:
            made, arguments, state, items, pairs = (*value.__reduce_ex__(2), (), ())[:5]
        except Exception as error:
            raise Undescribed from error
        attributes = state if isinstance(state, tuple) else (state,)
        held = [self._pairs(part or {}) for part in attributes]
        contents = [tuple(map(self.value, items or ())), tuple((self.value(a), self.value(b)) for a, b in pairs or ())]
        return ("object", self.value(made), *map(self.value, arguments), *held, *contents)


_Way = Callable[[_Describer, Any], object]
_WAYS: tuple[tuple[type | tuple[type, ...], _Way], ...] = (
    (nn.Module, _Describer._module),
    (Tensor, _Describer._tensor),
    (np.ndarray, _Describer._array),
    (np.generic, _Describer._number),
    (enum.Enum, _Describer._member),
    ((torch._ops.OpOverload, torch._ops.OpOverloadPacket), _Describer._operation),
    (functools.partial, _Describer._partial),
    (types.MethodType, _Describer._method),
    (types.BuiltinFunctionType, _Describer._builtin),
    (types.FunctionType, _Describer._function),
    (_SEQUENCES, _Describer._sequence),
    (_SETS, _Describer._set),
    (Mapping, _Describer._mapping),
)


def _check_count(value: Any) -> None:
    if len(value) > _MOST_ITEMS:
        raise Undescribed


def _digest(raw: Any) -> bytes:
    return hashlib.sha256(raw).digest()
