"""Networks are run with one state after the other, repeatably, and their outputs compared."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.graph.capture.module_state import hidden_tensors
from mergekit_ot.graph.capture.outputs import outputs_of, same_draws

State = Mapping[str, Tensor]
Inputs = tuple[object, ...]
# That of normalisations adds a counter that older files lack.
_PLAIN_LOADS = (nn.Module._load_from_state_dict, nn.BatchNorm1d._load_from_state_dict)
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Noise:
    """What a network's outputs differ by although its function is the same.

    Attributes:
        rounding: When its weights are moved by one rounding.
        chance: Between two runs of one state, with one seed and with another.
        error_in_double: What is left of the error when all is computed in double precision; infinite where the network
            cannot be run so.
    """

    rounding: float
    chance: float
    error_in_double: float


class Runner:
    """Runs a network with one state after the other.

    The module is built once, and again only where a forward left something in it that the next would see.

    Args:
        model: Gives the module.
        inputs: What it is run with.
    """

    def __init__(self, model: SourceModel, inputs: Inputs) -> None:
        self.model, self.inputs = model, inputs
        self._module: nn.Module | None = None

    def outputs(self, state: State, seed: int = 0, changed: Collection[str] | None = None) -> list[Tensor]:
        """Returns the float outputs of the module that holds a state, in double precision.

        Args:
            state: The state; its tensors are asked for one at a time.
            seed: Seed of what the forward draws.
            changed: The names in which it differs from the state of the last call; all where left out.
        """
        if self._module is None:
            self._module, changed = self.model.architecture().eval(), None
        load_one_by_one(self._module, state, changed)
        before = _left_in(self._module)
        found = outputs_of(self._module, self.inputs, seed)
        if before != _left_in(self._module):
            self._module = None
        return found

    def noise(self, state: State, other: Runner, moved: State) -> Noise:
        """Returns what the network differs by from itself, and in double precision from another with another state."""
        outputs, double = self.outputs(state), self._in_double(state)
        run = self.outputs if double is None else self._in_double
        # In double precision, what is rounded to single precision on the way still shows.
        rounded = {key: _rounded(value, is_single=double is not None) for key, value in state.items()}
        return Noise(
            rounding=difference(outputs if double is None else double, run(rounded)),
            # A forward may draw from generators that no seed here reaches.
            chance=max(difference(outputs, self.outputs(state, seed)) for seed in (0, 1)),
            error_in_double=difference(double, other._in_double(moved)),
        )

    def _in_double(self, state: State) -> list[Tensor] | None:
        inputs = tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in self.inputs)
        try:
            module = self.model.instance(state).double()
            # Loaded once more, since the instance rounded it to its own type.
            module.load_state_dict(dict(state), strict=False)
            return outputs_of(module, inputs, 0)
        except (RuntimeError, ValueError, TypeError):
            return None  # a forward that fixes its types cannot be run in another


@contextlib.contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Runs a block without gradients and with seeded random numbers, and gives the caller's back afterwards."""
    with same_draws(seed), torch.no_grad():
        yield


def load_one_by_one(module: nn.Module, state: State, names: Collection[str] | None = None) -> None:
    """Loads a state, or what stands under some names in it, asking for one tensor at a time.

    Counters of BatchNorm may be missing in it.

    Raises:
        RuntimeError: A tensor has another shape.
    """
    if not all(map(_is_loaded_plainly, module.modules())):
        module.load_state_dict(dict(state), strict=False)
        return
    own = module.state_dict()
    for name in state if names is None else names:
        if name in own:
            tensor = state[name]
            if tensor.shape != own[name].shape:
                raise RuntimeError(f"'{name}' has shape {tuple(tensor.shape)}, not {tuple(own[name].shape)}.")
            own[name].copy_(tensor)


def _is_loaded_plainly(module: nn.Module) -> bool:
    """Whether nothing but a copy happens where a module's own tensors are loaded: no hook, no code of its own."""
    kind = type(module)
    if kind._load_from_state_dict not in _PLAIN_LOADS or kind.get_extra_state is not nn.Module.get_extra_state:
        return False
    is_named_plainly = (
        kind.load_state_dict is nn.Module.load_state_dict
        and kind.state_dict is nn.Module.state_dict
        and kind._save_to_state_dict is nn.Module._save_to_state_dict
    )
    hooks = (
        *module._load_state_dict_pre_hooks,
        *module._load_state_dict_post_hooks,
        *module._state_dict_hooks,
        *module._state_dict_pre_hooks,
    )
    return is_named_plainly and not hooks


def _left_in(module: nn.Module) -> dict[str, object]:
    """Returns what a module holds besides its state: hidden tensors, buffers outside the state, plain values."""
    held: dict[str, object] = {where: id(tensor) for where, tensor in hidden_tensors(module).items()}
    kept = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name not in kept:
            held[name] = (id(buffer), buffer._version)
    for path, inner in module.named_modules():
        held |= {f"{path}.{name}": value for name, value in vars(inner).items() if isinstance(value, _PLAIN)}
    return held


def _rounded(tensor: Tensor, is_single: bool) -> Tensor:
    """Returns a tensor moved by one rounding, up or down: of its own type, or of single precision."""
    if not tensor.is_floating_point():
        return tensor
    signs = torch.randint(0, 2, tensor.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    moved = tensor.double() * (1 + signs * torch.finfo(torch.float32 if is_single else tensor.dtype).eps)
    return moved if is_single else moved.to(tensor.dtype)


def difference(ours: Sequence[Tensor] | None, theirs: Sequence[Tensor] | None) -> float:
    """Returns the largest difference between outputs, relative to the scale of each; infinite where one is odd.

    Numbers that are NaN or infinite in both, in the same way, are the same.
    """
    if ours is None or theirs is None or len(ours) != len(theirs):
        return float("inf")
    worst = 0.0
    for one, other in zip(ours, theirs, strict=True):
        if one.shape != other.shape:
            return float("inf")
        is_same = (one == other) | (one.isnan() & other.isnan())
        apart = torch.where(is_same, torch.zeros_like(one), (one - other).abs())
        finite = one[one.isfinite()].abs()
        scale = (float(finite.max()) if finite.numel() else 0.0) or 1.0
        found = float(apart.max()) / scale if apart.numel() else 0.0
        worst = max(worst, found if found == found else float("inf"))
    return worst


def remarks_on(name: str, outputs: Sequence[Tensor]) -> Iterator[str]:
    """Yields sentences on outputs of a source that cannot be compared."""
    if not outputs:
        yield (
            f"The output of '{name}' holds no floating-point tensor, so nothing shows whether the aligned source "
            "computes the same. Give a model whose forward returns tensors (in tuples, lists or mappings)."
        )
    bad = sum(int((~torch.isfinite(each)).sum()) for each in outputs)
    if bad:
        count = sum(each.numel() for each in outputs)
        yield (
            f"'{name}' itself computes NaN or infinity at the example inputs ({bad} of {count} outputs), though its "
            "weights are finite: only the other outputs were compared. Give inputs as the network expects them."
        )
