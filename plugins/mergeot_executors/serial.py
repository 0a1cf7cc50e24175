"""One step after the other, in this process."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx

from mergekit_ot import AbstractExecutor, Step


class SerialExecutor(AbstractExecutor):
    """Runs the steps in the order in which they were put into the graph, as far as its edges allow."""

    def run(self, steps: nx.DiGraph, run_step: Callable[[Step], None]) -> None:
        """Calls `run_step` for every step after its predecessors."""
        for number in nx.topological_sort(steps):
            run_step(steps.nodes[number]["step"])
