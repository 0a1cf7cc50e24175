"""Contracts that plugins can check themselves against; ours are checked against the same.

A third party's test of its solver is one line: ``check_solver(MySolver())``.
"""

from __future__ import annotations

from mergekit_ot.testing.solvers import check_solver, permuted, random_problem

__all__ = ["check_solver", "permuted", "random_problem"]
