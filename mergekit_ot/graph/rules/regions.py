"""Regions of a captured program that a module rule claims: all operations of one call of one module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        read: set[fx.Node] = set()
        for node in self.nodes:
            read.update(node.all_input_nodes)
        read.difference_update(self.nodes)
        return [node for node in self.nodes[0].graph.nodes if node in read]

    @property
    def outputs(self) -> list[fx.Node]:
        """Its values that are read outside, in the order of the graph."""
        inside = set(self.nodes)
        return [node for node in self.nodes if set(node.users) - inside]

    def arguments(self, program: CapturedProgram, environment: dict[fx.Node, Any]) -> dict[str, Any]:
        """Returns its operands: parameters by their names in the module, data as ``input0``, ``input1``."""
        slots = program.slots
        prefix = f"{self.path}." if self.path else ""
        arguments: dict[str, Any] = {}
        data = 0
        for node in self.inputs:
            target = slots[node].target if node in slots else ""
            if target and target.startswith(prefix):
                arguments[target.removeprefix(prefix)] = environment.get(node)
            else:
                arguments[f"input{data}"] = environment.get(node)
                data += 1
        return arguments


def find_regions(
    program: CapturedProgram, find_rule: Callable[[str], NodeRule | None]
) -> tuple[dict[fx.Node, Region], set[fx.Node]]:
    """Returns last operation → region for every region, and all operations inside one.

    A region is handled where its last operation stands, when everything that it reads is labelled.

    Args:
        program: The captured program.
        find_rule: Gives the rule for ``module:NAME``, or None.
    """
    claims = _claims(program, find_rule)
    regions: list[Region] = []
    last: str | None = None
    for node in program.graph.nodes if claims else ():
        if node.op != "call_function":
            continue
        call, path = _claimed_call(node, claims)
        if call is not None and call != last:
            regions.append(Region(path, *claims[path]))
        if call is not None:
            regions[-1].nodes.append(node)
        last = call
    inside = set[fx.Node]().union(*(region.nodes for region in regions))
    return {region.nodes[-1]: region for region in regions}, inside


def _claimed_call(node: fx.Node, claims: Mapping[str, tuple[str, NodeRule]]) -> tuple[str | None, str]:
    """Returns the outermost call of a claimed module in which an operation stands, and the path of the module."""
    # The key differs from call to call of one module, its path does not.
    for call, entry in (node.meta.get("nn_module_stack") or {}).items():
        if str(entry[0]) in claims:
            return call, str(entry[0])
    return None, ""


def _claims(program: CapturedProgram, find_rule: Callable[[str], NodeRule | None]) -> dict[str, tuple[str, NodeRule]]:
    """Returns the path of every module that has a rule → (name of the rule, rule)."""
    claims: dict[str, tuple[str, NodeRule]] = {}
    for path in program.module_types:
        claim = _claim(program, path, find_rule)
        if claim is not None:
            claims[path] = claim
    return claims


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
