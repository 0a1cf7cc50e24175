"""Copies of modules that `copy.deepcopy` refuses, and what torch recomputes before every forward."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode

from mergekit_ot.errors import ArchitectureError

# They set an attribute of their module from its parameters before every forward.
_RECOMPUTING = (WeightNorm, SpectralNorm)


class _DetachingCopies(TorchFunctionMode):
    """Copies the values of computed tensors, which torch refuses to copy with their history."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args[0], args[1]
            memo[id(tensor)] = memo.get(id(tensor), tensor.detach().clone())
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))


def copied(model: nn.Module, *, shares_weights: bool = False) -> nn.Module:
    """Returns a deep copy of a module; what cannot be copied (a lock, an open file) is shared with it.

    Tensors that were computed are copied without their history.

    Args:
        model: The module.
        shares_weights: Whether the parameters of the copy use the memory of the module's own; its buffers never do.

    Raises:
        ArchitectureError: It cannot be copied all the same.
    """
    weights = dict[int, object]()
    if shares_weights:
        plain = [weight for weight in model.parameters() if type(weight) is nn.Parameter]
        weights = {id(weight): nn.Parameter(weight.detach(), weight.requires_grad) for weight in plain}
    with _DetachingCopies():
        try:
            return copy.deepcopy(model, dict(weights))
        except Exception:
            shared = dict(_uncopyable(model))
        try:
            return copy.deepcopy(model, weights | {id(value): value for value in shared.values()})
        except Exception as error:
            raise ArchitectureError(
                f"'{type(model).__name__}' cannot be copied ({type(error).__name__}: {str(error)[:200]}), and it is "
                "traced and compared on copies. Give a function that builds it instead of an instance: in Python "
                "SourceModel(name, make, state)."
            ) from error


def _uncopyable(model: nn.Module) -> Iterator[tuple[str, object]]:
    """Yields the attributes of a module and its submodules that cannot be copied, by name."""
    for path, module in model.named_modules():
        for name, value in vars(module).items():
            if name in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(value)
            except Exception:
                yield f"{path}.{name}", value


def recomputed_names(module: nn.Module) -> set[str]:
    """Returns the attributes that the old weight and spectral norm set from parameters before every forward."""
    return {hook.name for hook in module._forward_pre_hooks.values() if isinstance(hook, _RECOMPUTING)}


def computing_when_read(model: nn.Module) -> nn.Module:
    """Lets weights of the old weight and spectral norm be computed where they are read, instead of by a hook.

    A hook sets a tensor on its module while the module runs, which `torch.export` forbids.

    Args:
        model: In evaluation mode; it is changed.
    """
    for module in model.modules():
        hooks = {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _RECOMPUTING)}
        if not hooks or isinstance(module, nn.RNNBase):
            continue  # a recurrent module reads a list that the hook fills
        for key, hook in hooks.items():
            del module._forward_pre_hooks[key]
            vars(module).pop(hook.name, None)
        kind = type(module)
        module.__class__ = type(kind.__name__, (kind,), {hook.name: _weight_of(hook) for hook in hooks.values()})
    return model


def _weight_of(hook: Any) -> property:
    if isinstance(hook, SpectralNorm):
        return property(lambda module: hook.compute_weight(module, do_power_iteration=False))
    return property(hook.compute_weight)


def uninitialised_names(model: nn.Module) -> list[str]:
    """Returns the parameters and buffers of lazy modules that no input has given a shape yet."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return [name for name, tensor in named if is_lazy(tensor)]


def with_shapes(model: nn.Module, inputs: tuple[object, ...]) -> nn.Module:
    """Returns a module whose lazy parts have the shapes that inputs give them; others are returned as they are.

    Only a copy is run, and only its lazy parts are taken over: what a forward leaves elsewhere stays in the copy.

    Raises:
        ArchitectureError: It cannot be run on these inputs.
    """
    lazy = uninitialised_names(model)
    if not lazy:
        return model
    run = copied(model).eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(*inputs)
    except Exception as error:
        raise ArchitectureError(
            f"'{lazy[0]}' of '{type(model).__name__}' is lazy, and its shape cannot be found by a run on the example "
            f"inputs ({type(error).__name__}: {str(error).splitlines()[0][:200]}). Give inputs that the model takes."
        ) from error
    shaped = copied(model)
    for path in {name.rpartition(".")[0] for name in lazy}:
        if not path:
            return run
        shaped.set_submodule(path, run.get_submodule(path))
    left = uninitialised_names(shaped)
    if left:
        raise ArchitectureError(
            f"'{left[0]}' of '{type(model).__name__}' is lazy, and forward does not reach it at the example inputs, so "
            "that it has no shape. Give it a fixed size."
        )
    return shaped


def making_shaped(make: Callable[[], nn.Module], inputs: tuple[object, ...]) -> Callable[[], nn.Module]:
    """Returns what builds the same module with its lazy parts in the shapes that inputs give them."""
    return (lambda: with_shapes(make(), inputs)) if uninitialised_names(make()) else make
