"""Where two runs of one function part: the first operation whose values differ by more than their order."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from mergekit_ot.fusion.repair import AlignedModels
from mergekit_ot.fusion.running import Inputs, State, difference, repeatable
from mergekit_ot.graph.capture.caching import without_cache
from mergekit_ot.graph.capture.program import CapturedProgram, reason_of

# Values in another order are the same when sorted; rounding stays below this share of their scale.
_PARTED = 1e-4
# Narrow types round more: so many times the distance of two neighbouring numbers at one.
_ROUNDINGS = 8
# A long list of values is told by so many of them.
_KEPT = 1 << 16


def first_parting(models: AlignedModels, number: int, state: State, aligned: State, inputs: Inputs) -> str:
    """Returns a sentence on where a source and its aligned copy part.

    Args:
        models: The networks and their alignment.
        number: Number of the source.
        state: What the source holds.
        aligned: What its aligned copy holds.
        inputs: What both are run with.
    """
    ours = _recorded(models.alignment.graphs[number].program, state, inputs)
    theirs = _recorded(models.alignment.target.program, aligned, inputs)
    for name, (node, values) in ours.items():
        if name in theirs and _have_parted(values, theirs[name][1]):
            reason = reason_of(node)
            where = f"at module '{reason.module_path}'" if reason.module_path else "in the network's own forward"
            source = f", {reason.source}" if reason.source else ""
            return f"The two part first {where} ({reason.operation or name}{source})."
    where = _first_module(models, number, state, aligned, inputs)
    if where:
        return (
            f"The two part first at module '{where}', though not as it was traced: its code takes another way when it "
            "runs (a branch, a cache)."
        )
    return "Where the two part cannot be told."


class _Recorder(fx.Interpreter):
    """Runs a captured program and keeps what its operations computed, without its order."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, tuple[fx.Node, Tensor]] = {}

    def run_node(self, node: fx.Node) -> Any:
        """Runs one operation."""
        value = super().run_node(node)
        # Memory that nobody has written yet holds anything.
        is_computed = node.op == "call_function" and "empty" not in node.name
        if is_computed and isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            self.seen[node.name] = node, _in_no_order(value)
        return value


def _recorded(program: CapturedProgram, state: State, inputs: Inputs) -> dict[str, tuple[fx.Node, Tensor]]:
    recorder = _Recorder(program.module)
    # What was seen until a program fails may tell already.
    with contextlib.suppress(RuntimeError, ValueError, TypeError, KeyError, IndexError), repeatable(0):
        recorder.run(*program.arguments(state, inputs))
    return recorder.seen


def _in_no_order(value: Tensor) -> Tensor:
    """Returns the sizes of all values, sorted: what neither a new order nor a change of signs alters."""
    values = value.detach().abs().reshape(-1).sort().values
    return values[:: max(len(values) // _KEPT, 1)].clone()


def _have_parted(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = max(_PARTED, _ROUNDINGS * torch.finfo(ours.dtype).eps)
    return not difference([ours.double()], [theirs.double()]) <= tolerance


def _first_module(models: AlignedModels, number: int, state: State, aligned: State, inputs: Inputs) -> str:
    """Returns the path of the first module of which a real run computes something else; empty where there is none."""
    ours = _outputs_by_module(models.sources[number].instance(state), inputs)
    theirs = _outputs_by_module(models.target.instance(aligned), inputs)
    return next((path for path, value in ours.items() if path in theirs and _have_parted(value, theirs[path])), "")


def _outputs_by_module(module: nn.Module, inputs: Inputs) -> Mapping[str, Tensor]:
    seen: dict[str, Tensor] = {}

    def keeping(path: str) -> Any:
        def keep(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point() and output.numel():
                seen.setdefault(path, _in_no_order(output))

        return keep

    for path, inner in module.named_modules():
        inner.register_forward_hook(keeping(path or "the network itself"))
    with repeatable(0), without_cache(module):
        module(*inputs)
    return seen
