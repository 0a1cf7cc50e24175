"""Runs a captured program piece by piece over many batches, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_arg

from mergekit_ot import CapturedProgram, SlotKind

# Bytes of values that runs may hold between two pieces; beyond it they start again from the inputs.
HELD_BYTES = 1_500_000_000


class HeldBytes:
    """What all runs together may hold between two pieces."""

    def __init__(self, limit: int = HELD_BYTES) -> None:
        self.limit = limit
        self.held = 0

    def claim(self, size: int, share: float = 1.0) -> bool:
        """Takes `size` bytes if there is room for them within a share of the limit."""
        if self.held + size > share * self.limit:
            return False
        self.held += size
        return True

    def release(self, size: int) -> None:
        """Gives `size` bytes back."""
        self.held -= size


class StagedRun:
    """A program on one batch, of which operations are run when their results are asked for.

    Args:
        program: The program.
        state: Parameters and buffers, read each time one is used: a change counts for what has not run yet.
        inputs: The batch.
        room: What may be held between two pieces.
    """

    def __init__(
        self, program: CapturedProgram, state: Mapping[str, Tensor], inputs: Sequence[Tensor], room: HeldBytes
    ) -> None:
        self.program, self.state, self.room = program, state, room
        self.nodes = {node.name: node for node in program.graph.nodes}
        self.slots = program.slots
        self.inputs = program.input_values(inputs)
        self.values: dict[fx.Node, Any] = {}
        self.used: set[fx.Node] = set()
        self.size = 0

    def values_of(self, names: Iterable[str]) -> dict[str, Any]:
        """Returns results of operations; what was run and is still held is not run again."""
        wanted = [self.nodes[name] for name in names]
        needed = self._missing(wanted)
        with torch.no_grad():
            for node in needed:
                self.values[node] = self._run(node)
                self.used.add(node)
                for read in node.all_input_nodes:
                    if read in self.values and read not in wanted and self._is_spent(read):
                        del self.values[read]
        return {node.name: self._value(node) for node in wanted}

    def change(self, name: str, function: Callable[[Tensor], Tensor]) -> None:
        """Changes a result that is held as its parameters were changed, so that nothing need be run again."""
        node = self.nodes[name]
        if node in self.values:
            self.values[node] = function(self.values[node])

    def release(self) -> None:
        """Lets go of everything: the next result is made from the inputs on."""
        self.values.clear()
        self.used.clear()
        self.settle()

    def settle(self) -> None:
        """Lets go of what nothing later reads, and of all where there is no room for it."""
        for node in [node for node in self.values if self._is_spent(node)]:
            del self.values[node]
        self.room.release(self.size)
        self.size = sum(map(_bytes_of, self.values.values()))
        if not self.room.claim(self.size):
            self.size = 0
            self.values.clear()
            self.used.clear()

    def _is_spent(self, node: fx.Node) -> bool:
        return all(user in self.used or user.op == "output" for user in node.users)

    def _missing(self, wanted: Iterable[fx.Node]) -> list[fx.Node]:
        """Returns what has to be run for the wanted results, in the order of the program."""
        missing: set[fx.Node] = set()
        waiting = list(wanted)
        while waiting:
            node = waiting.pop()
            if node in missing or node in self.values or node in self.slots:
                continue
            missing.add(node)
            waiting += node.all_input_nodes
        return [node for node in self.program.graph.nodes if node in missing]

    def _run(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return getattr(self.program.module, str(node.target))
        arguments = map_arg(node.args, self._value)
        keywords = map_arg(node.kwargs, self._value)
        return node.target(*arguments, **keywords)  # type: ignore[operator]

    def _value(self, node: fx.Node) -> Any:
        slot = self.slots.get(node)
        if slot is None:
            return self.values[node]
        return self.inputs[node] if slot.kind == SlotKind.INPUT else self.program.state_value(slot, self.state)


def staged_runs(
    program: CapturedProgram, state: Mapping[str, Tensor], batches: Iterable[Sequence[Tensor]], room: HeldBytes
) -> list[StagedRun]:
    """Returns a run of a program for each batch."""
    return [StagedRun(program, state, inputs, room) for inputs in batches]


def _bytes_of(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes_of, value)) if isinstance(value, tuple | list) else 0
