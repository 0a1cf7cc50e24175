"""What a model hands out: the tensors in its output, whatever holds them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import random
import types
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributions, fx, nn
from torch.utils import _pytree as pytree

from mergekit_ot.errors import ArchitectureError
from mergekit_ot.graph.capture.caching import without_cache

# Objects inside objects are looked into this far; what a model hands out is never nested deeper on purpose.
_MAX_DEPTH = 12
_CONTAINERS = (tuple, list, set, frozenset, Iterator)
# What may refer to everything there is, and holds no output.
_CLOSED = (nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, str, bytes, np.ndarray)
# These keep their parameters under private names too: both parts of a mixture, for one.
_OPEN = (distributions.Distribution, distributions.Transform)


class OutputError(ArchitectureError):
    """A module hands out nothing that could be compared."""


def tensors_of(output: object) -> list[Tensor]:
    """Returns the tensors in a model's output, in order and each once.

    A distribution gives its parameters, any other object its attributes.

    Example:
        >>> made = torch.distributions.Normal(torch.zeros(3), torch.ones(3))
        >>> [tuple(tensor.shape) for tensor in tensors_of({"policy": made, "value": torch.zeros(1)})]
        [(3,), (3,), (1,)]
    """
    return list(_tensors(output, {}, _MAX_DEPTH))


def _tensors(value: object, seen: dict[int, object], depth: int) -> Iterator[Tensor]:
    """Yields the tensors in a value; `seen` holds what was looked into, so that no address is given anew."""
    if isinstance(value, Tensor):
        if id(value) not in seen:
            seen[id(value)] = value
            yield value
        return
    if depth == 0 or value is None or isinstance(value, (*_CLOSED, bool, int, float, complex)) or id(value) in seen:
        return
    seen[id(value)] = value
    for item in _held(value):
        yield from _tensors(item, seen, depth - 1)


def _held(value: object) -> Iterable[object]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, _CONTAINERS) or type(value).__name__ == "deque":
        return list(value)  # type: ignore[call-overload]
    attributes = _attributes(value)
    public = {name: held for name, held in attributes.items() if not name.startswith("_")}
    if isinstance(value, _OPEN) or not any(isinstance(held, Tensor) for held in public.values()):
        return attributes.values()
    return public.values()


def _attributes(value: object) -> dict[str, object]:
    """Returns what an object holds by name, whether in a dictionary or in slots."""
    held: dict[str, object] = {}
    if dataclasses.is_dataclass(value):
        held |= {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names = (slots,) if isinstance(slots, str) else tuple(slots)
        held |= {name: getattr(value, name, None) for name in names if name not in ("__dict__", "__weakref__")}
    with contextlib.suppress(TypeError):
        held |= vars(value)
    return held


def float_outputs(output: object) -> list[Tensor]:
    """Returns the numbers in a model's output, whatever holds them, in float64; a complex one as two."""
    return [_as_double(value) for value in tensors_of(output) if value.is_floating_point() or value.is_complex()]


def _as_double(value: Tensor) -> Tensor:
    dense = value.to_dense() if value.layout is not torch.strided else value
    return torch.view_as_real(dense.to(torch.complex128)) if dense.is_complex() else dense.double()


def hand_out_tensors(model: nn.Module) -> nn.Module:
    """Lets an instance's forward return a flat tuple of tensors where its output is nothing that torch can trace.

    Tensors in tuples, lists, mappings and registered classes are left as they are.

    Returns:
        The same module.
    """
    if isinstance(model, torch.jit.ScriptModule):
        return model  # its forward is no Python
    forward = model.forward

    def handing_out(*arguments: Any, **named: Any) -> Any:
        output = forward(*arguments, **named)
        if isinstance(output, Tensor) or any(isinstance(leaf, fx.Proxy) for leaf in pytree.tree_leaves(output)):
            return output
        held = tensors_of(output)
        if not held:
            raise OutputError(no_tensor_sentence(type(model).__name__, output))
        return output if _is_plain(output) else tuple(held)

    # torch.export binds the inputs by the names in the signature.
    handing_out.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    model.forward = handing_out
    return model


def _is_plain(output: object) -> bool:
    return all(
        leaf is None or isinstance(leaf, Tensor | bool | int | float | str | complex)
        for leaf in pytree.tree_leaves(output)
    )


def no_tensor_sentence(name: str, output: object) -> str:
    """Returns the sentence for an output that holds no tensor."""
    return (
        f"The output of {name} holds no tensor: it is {_kind(output)}. What is fused must compute tensors: let forward "
        "return them, in a tuple, a mapping, a distribution or attributes of an object."
    )


def _kind(output: object) -> str:
    if output is None:
        return "None"
    inside = sorted({type(leaf).__name__ for leaf in pytree.tree_leaves(output)})
    name = type(output).__name__
    return f"of type {name}" if inside in ([], [name]) else f"of type {name} with {', '.join(inside[:4])} inside"


def outputs_of(model: nn.Module, inputs: Iterable[object], seed: int = 0) -> list[Tensor]:
    """Returns the numbers that a model hands out, in float64; what it draws at random is the same at every call.

    Inputs of another number type than the model's weights are given in the model's own.

    Args:
        model: In the mode that it is meant to run in.
        inputs: Positional inputs.
        seed: Of what it draws.

    Raises:
        OutputError: It hands out no tensor.

    Example:
        >>> class Noisy(nn.Module):
        ...     def forward(self, x):
        ...         return {"noisy": x + torch.randn(2)}
        >>> first, second = (outputs_of(Noisy(), [torch.zeros(2)])[0] for _ in range(2))
        >>> bool((first == second).all())
        True
    """
    given = tuple(inputs)
    try:
        output = _run(model, given, seed)
    except RuntimeError as error:
        own = _in_own_type(model, given)
        if own is None or not any(word in str(error).lower() for word in ("dtype", "scalar type", "same type")):
            raise
        output = _run(model, own, seed)
    held = tensors_of(output)
    if not held:
        raise OutputError(no_tensor_sentence(type(model).__name__, output))
    return float_outputs(held)


def _run(model: nn.Module, inputs: tuple[object, ...], seed: int) -> object:
    with torch.no_grad(), warnings.catch_warnings(), same_draws(seed), without_cache(model):
        warnings.simplefilter("ignore")  # what a forward warns of was told when it was traced
        return list(output) if isinstance(output := model(*inputs), Iterator) else output


def _in_own_type(model: nn.Module, inputs: tuple[object, ...]) -> tuple[object, ...] | None:
    """Returns the inputs in the one floating type of a model's weights; None where they are of several."""
    kinds = {weight.dtype for weight in model.parameters() if weight.is_floating_point()}
    if len(kinds) != 1:
        return None
    (kind,) = kinds
    return tuple(
        value.to(kind) if isinstance(value, Tensor) and value.is_floating_point() else value for value in inputs
    )


@contextlib.contextmanager
def same_draws(seed: int = 0) -> Iterator[None]:
    """Lets torch, NumPy and Python draw the same random numbers each time, and as before afterwards."""
    kept, held = random.getstate(), np.random.get_state()  # what models use
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        try:
            yield
        finally:
            random.setstate(kept)
            np.random.set_state(held)
