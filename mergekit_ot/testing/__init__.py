"""Contracts that plugins can check themselves against; ours are checked against the same.

A third party's test is one line: ``check_solver(MySolver())``, ``check_measure(MyMeasure())``,
``check_coupling(my_coupling)``, ``check_symmetry(MySymmetry(), make, inputs, groups=2)`` with a model that has it, or
``check_rule(MY_RULE, make, inputs, operation="aten.cdist", groups=2)`` with one that uses the operation.
"""

from __future__ import annotations

from mergekit_ot.testing.couplings import check_coupling
from mergekit_ot.testing.executors import check_executor
from mergekit_ot.testing.measures import check_measure
from mergekit_ot.testing.problems import permuted, random_problem
from mergekit_ot.testing.rules import check_rule
from mergekit_ot.testing.solvers import check_solver
from mergekit_ot.testing.stores import check_store, check_writer
from mergekit_ot.testing.symmetries import check_symmetry

__all__ = [
    "check_coupling",
    "check_executor",
    "check_measure",
    "check_rule",
    "check_solver",
    "check_store",
    "check_symmetry",
    "check_writer",
    "permuted",
    "random_problem",
]
