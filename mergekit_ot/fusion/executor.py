"""What an executor is: it runs the steps of a plan."""

from __future__ import annotations

import abc
from collections.abc import Callable

import networkx as nx

from mergekit_ot.fusion.plan import Step


class AbstractExecutor(abc.ABC):
    """Runs the steps of a plan, in any order that its graph allows."""

    @abc.abstractmethod
    def run(self, steps: nx.DiGraph, run_step: Callable[[Step], None]) -> None:
        """Calls `run_step` once for every node's ``step``, after its predecessors."""
