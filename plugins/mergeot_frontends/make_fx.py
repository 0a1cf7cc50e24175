"""The front end `make-fx`: the module runs once on real tensors, and every operation on the way is recorded.

It copes with what `torch.export` refuses (packed sequences, branches on data), at a price: the graph holds for the
branch that the example inputs take, the weights must be real, and writes in place stay in the graph. Those are turned
into plain operations where nothing else looks at the memory that is written, and refused elsewhere.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call  # pyright: ignore[reportPrivateImportUsage]
from torch.fx import traceback as fx_traceback
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from mergekit_ot import (
    AbstractFrontEnd,
    ArchitectureError,
    CapturedProgram,
    ProgramSlot,
    SlotKind,
    TraceBudget,
    operation_schema,
)


class MakeFxFrontEnd(AbstractFrontEnd):
    """Records one real run of the module."""

    is_fallback = True

    def capture(self, model: nn.Module, inputs: tuple[object, ...], budget: TraceBudget) -> CapturedProgram:
        """Returns the captured program of one run on `inputs`."""
        state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        names = list(state)
        flat, spec = pytree.tree_flatten(inputs)
        places = [place for place, value in enumerate(flat) if isinstance(value, Tensor)]

        def run(tensors: list[Tensor], given: list[Tensor]) -> list[Tensor]:
            arguments = list(flat)
            for place, value in zip(places, given, strict=True):
                arguments[place] = value
            held = dict(zip(names, tensors, strict=True))
            return _tensors_in(functional_call(model, held, pytree.tree_unflatten(arguments, spec)))

        record = make_fx(run, pre_dispatch=True, record_stack_traces=True, _error_on_data_dependent_ops=False)
        tensors = [value.detach().clone() for value in state.values()]
        with budget.watching(), _module_paths(model), _plain_attention(), torch.no_grad():
            recorded = record(tensors, [flat[place] for place in places])
        _without_writes(recorded)
        constants = _lift_constants(recorded)
        slots = [*_state_slots(model), *[ProgramSlot(SlotKind.INPUT)] * len(places)]
        slots += [ProgramSlot(SlotKind.RECORDED, name) for name in constants]
        (output,) = (node for node in recorded.graph.nodes if node.op == "output")
        outputs = tuple(ProgramSlot(SlotKind.USER_OUTPUT) for _ in pytree.tree_leaves(output.args[0]))
        values = {**dict(zip(names, tensors, strict=True)), **constants}
        return CapturedProgram(recorded, tuple(slots), outputs, values, "make-fx")


def _state_slots(model: nn.Module) -> list[ProgramSlot]:
    """Returns the slots of a module's parameters and buffers, in this order."""
    slots = [ProgramSlot(SlotKind.PARAMETER, name) for name, _ in model.named_parameters()]
    return slots + [ProgramSlot(SlotKind.BUFFER, name) for name, _ in model.named_buffers()]


def _tensors_in(results: object) -> list[Tensor]:
    return [value for value in pytree.tree_leaves(results) if isinstance(value, Tensor)]


@contextlib.contextmanager
def _plain_attention() -> Iterator[None]:
    """Keeps torch from replacing whole transformer layers by one fused operation when no gradient is needed."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _module_paths(model: nn.Module) -> Iterator[None]:
    """Lets every recorded operation carry the path of the module that calls it."""
    stack: OrderedDict[str, tuple[str, str]] = OrderedDict()
    calls = itertools.count()
    open_calls: dict[str, list[str]] = {}
    handles: list[Any] = []

    def enter(path: str, module: nn.Module) -> Any:
        def hook(*_: object) -> None:
            key = f"{path}@{next(calls)}"
            open_calls.setdefault(path, []).append(key)
            stack[key] = (path, f"{type(module).__module__}.{type(module).__qualname__}")
            fx_traceback.current_meta["nn_module_stack"] = OrderedDict(stack)

        return hook

    def leave(path: str) -> Any:
        def hook(*_: object) -> None:
            stack.pop(open_calls[path].pop(), None)
            fx_traceback.current_meta["nn_module_stack"] = OrderedDict(stack)

        return hook

    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(path, module)))
        handles.append(module.register_forward_hook(leave(path)))
    try:
        with fx_traceback.preserve_node_meta():
            yield
    finally:
        fx_traceback.current_meta.pop("nn_module_stack", None)
        for handle in handles:
            handle.remove()


def _without_writes(recorded: fx.GraphModule) -> None:
    """Replaces every operation that writes in place by its plain form.

    The recorder lets later uses of the written tensor read the result of the write, so that the plain form is the same
    as long as nothing else shares the memory.

    Raises:
        ArchitectureError: Something does: a view was written into, or a view of what was written is read later.
    """
    base: dict[fx.Node, fx.Node] = {}
    position = {node: number for number, node in enumerate(recorded.graph.nodes)}
    for node in list(recorded.graph.nodes):
        schema = operation_schema(node.target)
        if schema is None:
            continue
        shared = _shared_operands(node, schema)
        if shared:
            base[node] = base.get(shared[0], shared[0])
        if not schema.is_mutable:
            continue
        (written, *_) = _shared_operands(node, schema, is_write=True)
        plain = _plain_form(node.target)
        if plain is None or _is_shared_later(node, written, base, position):
            raise ArchitectureError(
                f"{node.target} writes into memory that other values share{_where(node)}, which make-fx cannot follow. "
                "Build the result with torch.cat or torch.where instead, so that torch.export captures the module."
            )
        node.target = plain
    recorded.graph.eliminate_dead_code()
    recorded.recompile()


def _shared_operands(node: fx.Node, schema: torch.FunctionSchema, is_write: bool = False) -> list[fx.Node]:
    """Returns the operands whose memory a result shares, or those that are written into."""
    operands = []
    for argument, value in zip(schema.arguments, node.args, strict=False):
        alias = argument.alias_info
        if isinstance(value, fx.Node) and alias is not None and (alias.is_write or not is_write):
            operands.append(value)
    return operands


def _is_shared_later(
    node: fx.Node, written: fx.Node, base: dict[fx.Node, fx.Node], position: dict[fx.Node, int]
) -> bool:
    """Whether something behind a write reads another value of the memory that it writes into.

    Args:
        node: The write.
        written: What it writes into.
        base: View → the value whose memory it shares.
        position: Operation → its number in the program.
    """
    root = base.get(written, written)
    sharing = [view for view, of_view in base.items() if of_view is root]
    others = [value for value in (*sharing, root) if value not in (node, written)]
    readers = itertools.chain.from_iterable(value.users for value in others)
    return any(position[reader] > position[node] for reader in readers)


def _plain_form(target: Any) -> Any:
    """Returns ``aten.relu.default`` for ``aten.relu_.default``, or None where there is no such operation."""
    packet, overload = str(target).split(".")[1:3]
    plain = getattr(torch.ops.aten, packet.rstrip("_"), None)
    return getattr(plain, overload, None) if packet.endswith("_") and plain is not None else None


def _where(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return f" at '{stack[-1][0]}'" if stack and stack[-1][0] else ""


def _lift_constants(recorded: fx.GraphModule) -> dict[str, Tensor]:
    """Turns tensors that the graph reads as attributes into placeholders behind the others; returns their values."""
    constants: dict[str, Tensor] = {}
    last = [node for node in recorded.graph.nodes if node.op == "placeholder"][-1]
    for node in list(recorded.graph.nodes):
        if node.op != "get_attr":
            continue
        value = getattr(recorded, str(node.target))
        if not isinstance(value, Tensor):
            continue
        with recorded.graph.inserting_after(last):
            last = recorded.graph.placeholder(f"constant{node.target}")
        last.meta["val"] = value
        node.replace_all_uses_with(last)
        recorded.graph.erase_node(node)
        constants[str(node.target)] = value
    recorded.recompile()
    return constants
