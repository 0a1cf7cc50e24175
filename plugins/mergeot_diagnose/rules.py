"""The advice: a few rules, tried in order, each with what it was seen on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mergeot_diagnose.network import NetworkKind

_NONE = "none"


@dataclass(frozen=True)
class Facts:
    """What the rules ask for.

    Attributes:
        kind: What kind of network it is.
        is_one_basin: Whether the neurons are in one order already; None where that cannot be said.
        has_data: Whether there are calibration data.
        has_equal_widths: Whether all networks have the same sizes.
        has_equal_heads: Whether their last layers have the same number of outputs.
        saw_different_things: Whether they are sure of different classes.
    """

    kind: NetworkKind
    is_one_basin: bool | None
    has_data: bool
    has_equal_widths: bool = True
    has_equal_heads: bool = True
    saw_different_things: bool = False


@dataclass(frozen=True)
class Rule:
    """One piece of advice, and when it holds.

    Attributes:
        name: Its name.
        holds: Whether it is for these facts.
        solver: What solver is advised.
        repair: What repair.
        why: Why, in one sentence.
        evidence: The page of the documentation with the measurements, as ``mergeot docs`` takes it.
        expected: Accuracy of the fused network over the mean of the sources, in points: from, to. None where
            nothing was measured.
    """

    name: str
    holds: Callable[[Facts], bool]
    solver: str
    repair: str
    why: str
    evidence: str
    expected: tuple[float, float] | None


@dataclass(frozen=True)
class Advice:
    """How to fuse networks, and what to expect.

    Attributes:
        rule: Name of the rule that decided.
        solver: The solver.
        repair: The repair, or ``none``.
        head: ``one``, or ``both`` where the fused network gets the heads of all.
        why: Why.
        evidence: The page of the documentation with the measurements.
        expected: Accuracy over the mean of the sources in points: from, to; None where nothing was measured.
        notes: What else to know.
    """

    rule: str
    solver: str
    repair: str
    head: str
    why: str
    evidence: str
    expected: tuple[float, float] | None
    notes: tuple[str, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of `mergekit_ot.fuse` that follow it."""
        return {"solver": self.solver, "repair": self.repair, "head": self.head}

    @property
    def flags(self) -> list[str]:
        """The flags of ``mergeot fuse`` that follow it."""
        flags = ["--solver", self.solver]
        flags += [] if self.repair == _NONE else ["--repair", self.repair]
        return flags if self.head == "one" else [*flags, "--head", self.head]


RULES: tuple[Rule, ...] = (
    Rule(
        "one order, statistics kept",
        lambda facts: facts.is_one_basin is True and facts.kind.has_statistics and facts.has_data,
        "average",
        "reset",
        "Their neurons are in one order already, so the plain average works; BatchNorm's statistics are taken anew.",
        "repairs",
        (-2.0, 1.0),
    ),
    Rule(
        "one order",
        lambda facts: facts.is_one_basin is True,
        "average",
        _NONE,
        "Their neurons are in one order already, as those of two fine-tunes of one base: aligning gains nothing.",
        "diagnosing",
        (-2.0, 1.0),
    ),
    Rule(
        "nothing to align",
        lambda facts: facts.kind.free_groups == 0,
        "average",
        _NONE,
        "No group of neurons has an order to choose, so there is nothing to align; 'pinned' below says why.",
        "unknown-operations",
        None,
    ),
    Rule(
        "different classes",
        lambda facts: facts.saw_different_things and facts.has_data,
        "wb",
        "refit",
        "They are sure of different classes: the mean of their weights knows neither, a fit to both does.",
        "repairs",
        (0.0, 12.0),
    ),
    Rule(
        "attention, data",
        lambda facts: facts.kind.has_attention and facts.has_data,
        "activation-matching",
        "refit",
        "Streams and heads have no order to match; refit rebuilds them from what the networks compute on data.",
        "repairs",
        (-3.0, 1.0),
    ),
    Rule(
        "attention, no data",
        lambda facts: facts.kind.has_attention,
        "weight-matching",
        _NONE,
        "weight-matching also rotates streams and heads, which the other solvers only reorder.",
        "side-by-side",
        (-20.0, -2.0),
    ),
    Rule(
        "recurrent, data",
        lambda facts: facts.kind.is_recurrent and facts.has_data,
        "gwb",
        "refit",
        "Neurons of a recurrent layer are told apart by what they read of each other, which gwb compares.",
        "side-by-side",
        (-6.0, 4.0),
    ),
    Rule(
        "recurrent, no data",
        lambda facts: facts.kind.is_recurrent,
        "gwb",
        _NONE,
        "Neurons of a recurrent layer are told apart by what they read of each other, which gwb compares.",
        "side-by-side",
        (-45.0, 0.0),
    ),
    Rule(
        "statistics, data",
        lambda facts: facts.kind.has_statistics and facts.has_data,
        "activation-matching",
        "refit",
        "BatchNorm's running statistics do not fit a fused network; refit fits the layers and writes them anew.",
        "side-by-side",
        (-8.0, 2.0),
    ),
    Rule(
        "statistics, no data",
        lambda facts: facts.kind.has_statistics,
        "weight-matching",
        _NONE,
        "BatchNorm's running statistics do not fit a fused network, and without data nothing can mend them.",
        "side-by-side",
        (-90.0, -10.0),
    ),
    Rule(
        "data",
        lambda facts: facts.has_data,
        "activation-matching",
        "refit",
        "With inputs, without labels, neurons are matched by what they respond to, and every layer is fitted.",
        "side-by-side",
        (-4.0, 1.0),
    ),
    Rule(
        "other widths, no data",
        lambda facts: not facts.has_equal_widths,
        "wb",
        _NONE,
        "Neurons of layers of other widths have no partner each; the barycenter shares them out.",
        "solvers",
        None,
    ),
    Rule(
        "no data",
        lambda facts: True,
        "weight-matching",
        _NONE,
        "Without data, neurons are matched by all their weights.",
        "side-by-side",
        (-20.0, -1.0),
    ),
)


def advise(facts: Facts) -> Advice:
    """Returns the advice of the first rule that holds, with what else follows from the facts.

    Example:
        >>> kind = NetworkKind(False, False, True, 1, 100.0, ())
        >>> advise(Facts(kind, is_one_basin=False, has_data=False)).flags
        ['--solver', 'gwb']
    """
    rule = next(rule for rule in RULES if rule.holds(facts))
    head = "one" if facts.has_equal_heads else "both"
    return Advice(
        rule.name, rule.solver, rule.repair, head, rule.why, rule.evidence, rule.expected, tuple(_notes(facts, rule))
    )


def _notes(facts: Facts, rule: Rule) -> list[str]:
    notes = []
    if not facts.has_equal_heads:
        notes.append("Their last layers differ in size: --head both keeps the outputs of all, side by side.")
    if facts.is_one_basin is True and facts.saw_different_things:
        notes.append("They are sure of different classes: compare with --solver wb --repair refit on data.")
    if not facts.has_data and facts.is_one_basin is not True:
        notes.append("Some hundred inputs without labels help more than any solver: pass --data SPEC.")
    if facts.kind.has_statistics and not facts.has_data:
        notes.append("A network with BatchNorm needs them: with --data, --repair reset is the least.")
    if rule.repair == "refit" and (facts.kind.has_statistics or facts.kind.is_recurrent):
        notes.append("One network alone may be the better one; --fallback writes that one where it is seen.")
    return notes
