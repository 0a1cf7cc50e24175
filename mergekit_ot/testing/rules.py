"""The contract of node rules, checked on a model that uses the operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from mergekit_ot.api import check_model
from mergekit_ot.errors import PluginError
from mergekit_ot.graph.axes.expressions import Atom, atoms_of, resolve
from mergekit_ot.graph.rules.rule import Labels, NodeRule, OperationView, Value
from mergekit_ot.graph.symmetry.check import CheckReport
from mergekit_ot.hooks.manager import Entry, PluginManager, default_manager
from mergekit_ot.testing.clauses import Contract


def check_rule(
    rule: NodeRule | str,
    make: Callable[[], nn.Module],
    example_inputs: Tensor | tuple[object, ...],
    *,
    operation: str = "",
    groups: int | None = None,
    manager: PluginManager | None = None,
    seed: int = 0,
) -> CheckReport:
    """Checks a node rule against its contract on a model that uses the operation.

    The clauses: the model uses the rule; the rule neither raises nor gives labels of other sizes than the operation;
    it accounts for every axis; random orders of the neurons keep the function; and they are free to move that
    should be. A rule that only pins too much breaks the last clause alone, so say with `groups` what you expect.

    Args:
        rule: Name of a registered rule, such as ``"aten.linear"``, or a rule that need not be registered.
        make: Gives a fresh instance each time; it must never have been run.
        example_inputs: Inputs of the shapes the model takes.
        operation: Operation of a rule given as an object (``"aten.cdist"``); other rules come from `manager`.
        groups: Free groups expected, counted by hand; 0 where the rule is to pin. Where left out, there must be one
            that reaches the operation.
        manager: The plugins whose rules are used; the installed ones by default.
        seed: Seed of the random weights, inputs and orders.

    Returns:
        The report of the model, for further questions.

    Raises:
        PluginError: A clause is broken (the message says which), or no rule is registered under that name.
        ArchitectureError: The model cannot be traced.

    Example:
        >>> net = lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> import torch
        >>> check_rule("aten.linear", net, torch.randn(2, 4), groups=1).certified
        1
    """
    base = manager if manager is not None else default_manager()
    if isinstance(rule, str):
        operation, rule = rule, base.get("rule", rule)
    if not operation:
        raise PluginError("A rule that is not registered needs the name of its operation: check_rule(…, operation=…).")
    watched = _Watched(rule)  # type: ignore[arg-type]
    report = check_model(make, example_inputs, manager=_WithRule(base, operation, watched), seed=seed)
    contract = Contract(f"The rule for '{operation}'", "How rules are written: see 'mergeot docs writing-plugins'.")
    for clause in (_is_used, _fits, _accounts_for_every_axis, _keeps_the_function, _frees_what_is_expected, _is_proven):
        contract.check(clause, watched, report, groups)
    return report


class _Watched(NodeRule):
    """A rule that remembers which operations it was asked about, and which neurons reached it."""

    def __init__(self, rule: NodeRule) -> None:
        self.rule, self.is_movement, self.state = rule, rule.is_movement, rule.state
        self.operations: set[str] = set()
        self.reached: set[Atom] = set()

    def label(self, operation: OperationView) -> list[Labels]:
        self.operations.add(operation.name)
        for value in _values(operation.arguments.values()):
            self.reached |= {atom for label in value.labels for atom in atoms_of(label)}
        return self.rule.label(operation)

    @property
    def frees_something(self) -> bool:
        """Whether neurons that reached the operation may move."""
        left = {atom for reached in self.reached for atom in atoms_of(resolve(reached))}
        return any(atom.pin is None and atom.size > 1 for atom in left)


def _values(arguments: Iterable[Any]) -> list[Value]:
    found: list[Value] = []
    for argument in arguments:
        if isinstance(argument, Value):
            found.append(argument)
        elif isinstance(argument, list | tuple):
            found += _values(argument)
    return found


class _WithRule(PluginManager):
    """The rules of another manager, with one of them replaced."""

    def __init__(self, base: PluginManager, operation: str, rule: NodeRule) -> None:
        super().__init__()
        self._symmetries = base.symmetries
        self._rules = {**base.node_rules, operation: Entry(operation, "the rule that is checked", rule)}

    @property
    def node_rules(self) -> Mapping[str, Entry]:
        """The rules, the replaced one included."""
        return self._rules

    @property
    def symmetries(self) -> Mapping[str, Entry]:
        """The symmetries of the other manager."""
        return self._symmetries


def _is_used(rule: _Watched, report: CheckReport, groups: int | None) -> str:
    """The model has an operation for which the rule is asked."""
    if rule.operations:
        return ""
    names = sorted({str(node.get("operation")) for _, node in report.graph.operations.nodes(data=True)})
    used = ", ".join(name for name in names if "." in name)
    return f"the traced model has none; its operations are {used or 'none'}"


def _fits(rule: _Watched, report: CheckReport, groups: int | None) -> str:
    """The rule does not raise, and its labels have the sizes of the operation's outputs."""
    sentences = report.graph.diagnostics.rule_errors
    return next((each for each in sentences if each.split(" at '")[0] in rule.operations), "")


def _accounts_for_every_axis(rule: _Watched, report: CheckReport, groups: int | None) -> str:
    """Every axis of the inputs is in an output, unified, contracted, mixed along or pinned."""
    named = [f"The rule for {name} " for name in sorted(rule.operations)]
    return next((each for each in report.graph.diagnostics.unaccounted if each.startswith(tuple(named))), "")


def _keeps_the_function(rule: _Watched, report: CheckReport, groups: int | None) -> str:
    """The function stays when the neurons are reordered."""
    if report.culprits:
        return f"it changed with the neurons of {', '.join(report.culprits)}: the rule ties or pins too little"
    return ""


def _frees_what_is_expected(rule: _Watched, report: CheckReport, groups: int | None) -> str:
    """As many groups are free as expected; where no number is given, one that reaches the operation."""
    pins = "; ".join(report.pins) or "nothing is pinned"
    if groups is None:
        return "" if rule.frees_something else f"no neuron that reaches the operation may move: {pins}"
    if report.groups == groups:
        return ""
    free = ", ".join(report.graph.free_groups) or "none"
    return f"{report.groups} groups are free instead of {groups}: {free}. Pinned: {pins}"


def _is_proven(rule: _Watched, report: CheckReport, groups: int | None) -> str:
    """Moving one member of a free group alone changes the model's output, so that the check can fail."""
    open_groups = [str(row["name"]) for row in report.rows if row["status"] == "not certified"]
    if open_groups:
        return f"nothing in this model proves {', '.join(open_groups)}; take a model that is sensitive to it"
    return ""
