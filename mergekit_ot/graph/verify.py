"""The planted-order test: reorder every group at random; the function must stay.

What would let the test lie is excluded: the model is never run before it is captured, every forward runs on a fresh
instance, parameters and buffers are randomised first (fresh norms are blind to order), and a group counts as
certified only if moving one of its members alone changes the output by far more than the model's own noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mergekit_ot.graph.blocks import random_orders, reorder, reorder_state
from mergekit_ot.graph.capture import as_inputs, doubled
from mergekit_ot.graph.expressions import PinReason
from mergekit_ot.graph.ir import ModelGraph, layout_size, leaf_groups
from mergekit_ot.graph.trace import trace_model

if TYPE_CHECKING:
    from mergekit_ot.plugin_manager import PluginManager

TOLERANCE = 1e-10
# Some layers compute in float32 whatever they are given (RMSNorm of several libraries): their rounding stays.
UPCAST_TOLERANCE = 1e-5
SENSITIVITY = 20.0
# Large enough to change a number in single precision, small enough for curvature to stay below the tolerance.
_STEP = 1e-8

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class CheckReport:
    """What a check found.

    Attributes:
        groups: Number of free groups.
        families: Number of independent orders (a family counts once per index of its context).
        certified: Free groups whose test can fail: moving one member alone changes the output.
        pinned: Number of parameter axes that stay in place as a whole.
        max_error: Largest change of the output over random orders of all groups, relative to the output's scale.
        preserved: Whether the function stays; None where no group is free (nothing was tested).
        rows: One record per group for a table.
        pins: A sentence per pin reason.
        culprits: Groups that had to be pinned because the function changed with them.
        graph: The graph, with the culprits pinned.
    """

    groups: int
    families: int
    certified: int
    pinned: int
    max_error: float | None
    preserved: bool | None
    rows: tuple[dict[str, Any], ...]
    pins: tuple[str, ...]
    warnings: tuple[str, ...]
    culprits: tuple[str, ...]
    graph: ModelGraph


def check_model(
    make: Callable[[], nn.Module],
    example_inputs: Tensor | tuple[object, ...],
    *,
    manager: PluginManager | None = None,
    seed: int = 0,
    trials: int = 2,
) -> CheckReport:
    """Verifies the neuron groups of a model on fresh instances and pins those that do not hold.

    Args:
        make: Gives a fresh instance each time; it must never have been run.
        example_inputs: Inputs of the shapes the model takes.
        manager: Whose node rules are used; the installed plugins by default.
        seed: Seed of the random weights, inputs and orders.
        trials: Number of random orders of all groups.

    Raises:
        ArchitectureError: The model cannot be traced.

    Example:
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = check_model(make, torch.randn(2, 4))
        >>> report.groups, report.certified, report.preserved
        (1, 1, True)
    """
    graph = trace_model(make(), example_inputs, manager)
    proof = _Proof(make, doubled(as_inputs(example_inputs)), seed)
    culprits: list[str] = []
    shapes = [proof, *proof.at_other_shapes()]
    for at_shape in shapes:
        while (error := at_shape.error(graph, trials)) is not None and error > at_shape.tolerance:
            culprit = at_shape.bisect(graph, list(graph.free_groups))
            culprits += culprit
            graph = pinned(graph, culprit, "the function changed when it was reordered")
    errors = [found for at_shape in shapes if (found := at_shape.error(graph)) is not None]
    error = max(errors, default=None)
    certified = {key for key in graph.free_groups if proof.is_sensitive(graph, key)}
    return _report(graph, error, certified, culprits, proof)


class _Proof:
    """Fresh instances, randomised weights and inputs in float64, and the comparisons made with them."""

    def __init__(
        self, make: Callable[[], nn.Module], inputs: tuple[object, ...], seed: int, state: State | None = None
    ) -> None:
        self.make = make
        self.dtype = torch.float64
        self.generator = torch.Generator().manual_seed(seed)
        self.inputs = tuple(self._random_input(x) for x in inputs)
        self.state = self._random_state() if state is None else state
        try:
            self.reference = self.run(self.state)
        except RuntimeError as error:
            if "Double" not in str(error) and "double" not in str(error):
                raise
            # A forward that makes tensors of a fixed type cannot run in another one.
            self.dtype = torch.float32
            self.reference = self.run(self.state)
        self.scale = max((float(x.abs().max()) for x in self.reference if x.numel()), default=1.0) or 1.0
        self.noise = self._distance(self.run(self.state))
        self.tolerance = TOLERANCE if self._is_double() else UPCAST_TOLERANCE

    def at_other_shapes(self) -> list[_Proof]:
        """Returns the same proof at a larger batch, and at the first longer axis that the model accepts.

        A table traced at one length, or a shape baked into the graph, holds at the traced shape only.
        """
        found = []
        tensors = [x for x in self.inputs if isinstance(x, Tensor)]
        for axis in range(min((x.ndim for x in tensors), default=0)):
            inputs = tuple(_longer(x, axis) if isinstance(x, Tensor) else x for x in self.inputs)
            try:
                found.append(_Proof(self.make, inputs, 1, self.state))
            except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
                continue
            if axis > 0:
                break
        return found

    def _random_input(self, value: object) -> object:
        if isinstance(value, Tensor) and value.is_floating_point():
            return torch.randn(value.shape, generator=self.generator, dtype=torch.float64)
        return value

    def _random_state(self) -> dict[str, Tensor]:
        state = {}
        for name, tensor in self.make().state_dict().items():
            if not tensor.is_floating_point():
                state[name] = tensor.clone()
                continue
            noise = torch.randn(tensor.shape, generator=self.generator, dtype=torch.float64)
            fan_in = max(tensor[0].numel(), 1) if tensor.ndim > 1 else 1
            # Variances must stay positive, and gains near one keep deep nets from exploding.
            if name.endswith("running_var"):
                state[name] = 0.5 + noise.abs()
            else:
                state[name] = noise / fan_in**0.5 if tensor.ndim > 1 else 0.5 * noise + (1.0 if "weight" in name else 0)
        return state

    def run(self, state: State) -> list[Tensor]:
        """Returns the float outputs of a fresh instance that holds `state`."""
        model = copy.deepcopy(self.make()).to(self.dtype).eval()
        model.load_state_dict({k: v.clone() for k, v in state.items()}, strict=False)
        inputs = [x.to(self.dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for x in self.inputs]
        torch.manual_seed(0)
        with torch.no_grad():
            return float_outputs(model(*inputs))

    def _is_double(self) -> bool:
        """Whether the model computes in float64 throughout.

        A smooth function is straight over a small enough step; one that rounds to single precision on the way is not.
        """
        if self.dtype is not torch.float64:
            return False
        generator = torch.Generator().manual_seed(1)
        ways = {
            k: v * torch.randn(v.shape, generator=generator, dtype=torch.float64) if v.is_floating_point() else None
            for k, v in self.state.items()
        }

        def moved(step: float) -> list[Tensor]:
            return self.run({k: v if (way := ways[k]) is None else v + step * way for k, v in self.state.items()})

        pairs = zip(moved(_STEP), moved(2 * _STEP), self.reference, strict=True)
        bends = [float((two - 2 * one + here).abs().max()) / self.scale for one, two, here in pairs if here.numel()]
        return max(bends, default=0.0) < TOLERANCE

    def _distance(self, outputs: list[Tensor]) -> float:
        pairs = zip(outputs, self.reference, strict=True)
        return max((float((a - b).abs().max()) / self.scale for a, b in pairs if a.numel()), default=0.0)

    def error(self, graph: ModelGraph, trials: int = 1, only: list[str] | None = None) -> float | None:
        """Returns the largest relative change of the output over random orders; None where no group is free."""
        if not graph.free_groups:
            return None
        worst = 0.0
        for _ in range(trials):
            orders = random_orders(graph, self.generator)
            chosen = orders if only is None else {key: orders[key] for key in only}
            distance = self._distance(self.run(reorder_state(self.state, graph, chosen)))
            worst = max(worst, distance if distance == distance else float("inf"))
        return worst

    def bisect(self, graph: ModelGraph, keys: list[str]) -> list[str]:
        """Returns the groups that change the function on their own, or, where only a mixture does, all of `keys`."""
        alone = [key for key in keys if (self.error(graph, 1, [key]) or 0.0) > self.tolerance]
        return alone or keys

    def is_sensitive(self, graph: ModelGraph, key: str) -> bool:
        """Whether moving one member of the group without the others changes the output by more than the noise."""
        orders = {key: random_orders(graph, self.generator)[key]}
        names = dict.fromkeys(slot.parameter for slot in graph.groups[key].members)
        for name in names:
            alone = dict(self.state)
            alone[name] = reorder(self.state[name], graph.layouts[name], graph, orders)
            for other, described in graph.aliases.items():
                if described == name and other in alone:
                    alone[other] = alone[name]
            if self._distance(self.run(alone)) > SENSITIVITY * max(self.noise, self.tolerance):
                return True
        return False


def _longer(tensor: Tensor, axis: int) -> Tensor:
    """Returns the tensor with two more entries along an axis, the same as its last."""
    last = tensor.narrow(axis, tensor.shape[axis] - 1, 1)
    return torch.cat([tensor, last, last], axis)


def pinned(graph: ModelGraph, keys: list[str], why: str) -> ModelGraph:
    """Returns the graph with `keys` pinned, and every family indexed by one of them."""
    lost = set(keys)
    while True:
        more = {k for k, group in graph.free_groups.items() if lost & set(group.context)} - lost
        if not more:
            break
        lost |= more
    groups = {k: replace(g, pin=PinReason(why)) if k in lost else g for k, g in graph.groups.items()}
    return replace(graph, groups=groups)


def float_outputs(output: Any) -> list[Tensor]:
    """Returns the floating-point tensors in a model's output, whatever holds them, in float64."""
    return [x.double() for x in _tensors(output) if x.is_floating_point()]


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        return [x for value in output.values() for x in _tensors(value)]
    if isinstance(output, tuple | list):
        return [x for value in output for x in _tensors(value)]
    return []


def _report(
    graph: ModelGraph, error: float | None, certified: set[str], culprits: list[str], proof: _Proof
) -> CheckReport:
    rows = []
    for key, group in graph.groups.items():
        if group.is_free or key in culprits:
            status = "certified" if key in certified else ("pinned" if group.pin else "not certified")
            members = len({slot.parameter for slot in group.members})
            rows.append({"name": key, "size": group.size, "orders": graph.family_size(key), "members": members,
                         "status": status, "flags": sorted(group.flags)})  # fmt: skip
    axes = [_fixed_axes(graph, name) for name in graph.layouts if name not in graph.buffers]
    preserved = None if error is None else error <= proof.tolerance
    return CheckReport(
        len(graph.free_groups), sum(graph.family_size(key) for key in graph.free_groups), len(certified),
        sum(axes), error, preserved, tuple(rows), graph.pin_sentences(), graph.diagnostics.sentences,
        tuple(culprits), graph,
    )  # fmt: skip


def _fixed_axes(graph: ModelGraph, parameter: str) -> int:
    """Returns how many axes of a parameter hold no free group."""
    layouts = graph.layouts[parameter]
    return sum(
        layout_size(layout) > 1 and not any(key in graph.free_groups for key in leaf_groups(layout))
        for layout in layouts
    )
