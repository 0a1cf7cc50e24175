"""Regions of a captured program that a module rule claims: all operations of one call of one module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from mergekit_ot.graph.capture.program import CapturedProgram
from mergekit_ot.graph.rules.rule import NodeRule


@dataclass
class Region:
    """The operations of one call of a module that has a rule.

    Attributes:
        path: Path of the module.
        name: Key under which its rule is registered, ``module:Experts``.
        rule: The rule.
        nodes: Its operations, in order.
    """

    path: str
    name: str
    rule: NodeRule
    nodes: list[fx.Node] = field(default_factory=list)

    @property
    def inputs(self) -> list[fx.Node]:
        """What it reads from outside, parameters included, in the order of the graph."""
        inside = set(self.nodes)
        read = {used for node in self.nodes for used in node.all_input_nodes if used not in inside}
        return [node for node in self.nodes[0].graph.nodes if node in read]

    @property
    def outputs(self) -> list[fx.Node]:
        """Its values that are read outside, in the order of the graph."""
        inside = set(self.nodes)
        return [node for node in self.nodes if any(user not in inside for user in node.users)]

    def arguments(self, program: CapturedProgram, environment: dict[fx.Node, Any]) -> dict[str, Any]:
        """Returns its operands: parameters by their names in the module, data as ``input0``, ``input1``."""
        slots = program.slots
        prefix = f"{self.path}." if self.path else ""
        found: dict[str, Any] = {}
        data = 0
        for node in self.inputs:
            target = slots[node].target if node in slots else ""
            if target and target.startswith(prefix):
                found[target.removeprefix(prefix)] = environment.get(node)
            else:
                found[f"input{data}"] = environment.get(node)
                data += 1
        return found


def find_regions(
    program: CapturedProgram, find_rule: Callable[[str], NodeRule | None]
) -> tuple[dict[fx.Node, Region], set[fx.Node]]:
    """Returns last operation → region for every region, and all operations inside one.

    A region is handled where its last operation stands, when everything that it reads is labelled.

    Args:
        program: The captured program.
        find_rule: Gives the rule for ``module:NAME``, or None.
    """
    regions: list[Region] = []
    current: Region | None = None
    last: str | None = None
    claimed = {path: found for path in program.module_types if (found := _claim(program, path, find_rule)) is not None}
    for node in program.graph.nodes if claimed else ():
        if node.op != "call_function":
            continue
        stack = (node.meta.get("nn_module_stack") or {}).items()
        # The key differs from call to call of one module, its path does not.
        call, path = next(((key, str(entry[0])) for key, entry in stack if str(entry[0]) in claimed), (None, None))
        if call is None or path is None:
            current = None
            continue
        if current is None or last != call:
            current = Region(path, *claimed[path])
            regions.append(current)
        last = call
        current.nodes.append(node)
    return {region.nodes[-1]: region for region in regions}, {node for region in regions for node in region.nodes}


def _claim(
    program: CapturedProgram, path: str, find_rule: Callable[[str], NodeRule | None]
) -> tuple[str, NodeRule] | None:
    """Returns the rule of the module at `path`: by its qualified name first, then by its bare name."""
    own = program.module_types[path][0]
    for name in (f"module:{own}", f"module:{own.rsplit('.', 1)[-1]}"):
        rule = find_rule(name)
        if rule is not None:
            return name, rule
    return None
