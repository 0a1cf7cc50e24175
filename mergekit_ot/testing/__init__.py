"""Contracts that plugins can check themselves against; ours are checked against the same.

A third party's test is one line: ``check_solver(MySolver())``, ``check_measure(MyMeasure())``,
``check_coupling(my_coupling)``, or ``check_rule(MY_RULE, make, inputs, operation="aten.cdist", groups=2)`` with a model
that uses the operation.
"""

from __future__ import annotations

from mergekit_ot.testing.couplings import check_coupling
from mergekit_ot.testing.measures import check_measure
from mergekit_ot.testing.problems import permuted, random_problem
from mergekit_ot.testing.rules import check_rule
from mergekit_ot.testing.solvers import check_solver

__all__ = ["check_coupling", "check_measure", "check_rule", "check_solver", "permuted", "random_problem"]
