"""What an executor is: it takes the steps of a sweep as they become ready, and gives back what they found."""

from __future__ import annotations

import abc
from collections.abc import Callable

import networkx as nx

from mergekit_ot.errors import SolverError
from mergekit_ot.fusion.task import StepSolution, StepTask


class TaskQueue:
    """The steps of one sweep: what is ready is taken, what was found is given back, and more becomes ready.

    Args:
        steps: Graph of the steps' numbers, in the order of the sweep; an edge where one waits for another.
        make: Gives the task of a step; called when it is taken, so that it holds all couplings of its predecessors.
        accept: Takes a solution.

    Example:
        >>> steps = nx.DiGraph([(0, 2), (1, 2)])
        >>> queue = TaskQueue(steps, make=lambda number: number, accept=lambda solution: None)
        >>> queue.take(), queue.take(), queue.take()
        (0, 1, None)
        >>> [queue.give(StepSolution(number, {}, ())) for number in (1, 0)] and queue.take()
        2
    """

    def __init__(
        self, steps: nx.DiGraph, make: Callable[[int], StepTask], accept: Callable[[StepSolution], None]
    ) -> None:
        self._make, self._accept = make, accept
        self._waits = {number: set(steps.predecessors(number)) for number in nx.topological_sort(steps)}
        self._taken: set[int] = set()
        self._done: set[int] = set()

    @property
    def is_done(self) -> bool:
        """Whether every step was given back."""
        return len(self._done) == len(self._waits)

    def take(self) -> StepTask | None:
        """Returns the next step that is ready; None where none is left, or all others wait for one under way."""
        for number, waits in self._waits.items():
            if number not in self._taken and waits <= self._done:
                self._taken.add(number)
                return self._make(number)
        return None

    def give(self, solution: StepSolution) -> None:
        """Hands in what a step found; from now on the couplings hold.

        Raises:
            SolverError: Nobody took that step, or it was given back before.
        """
        if solution.number not in self._taken or solution.number in self._done:
            raise SolverError(
                f"Step {solution.number} was given back without having been taken, or twice: the executor mixes up its "
                "steps. Check it with mergekit_ot.testing.check_executor."
            )
        self._accept(solution)
        self._done.add(solution.number)


class AbstractExecutor(abc.ABC):
    """Runs the steps of a sweep, in any order that the queue allows; it never changes the alignment itself.

    Example:
        >>> from mergekit_ot import run_task
        >>> class Serial(AbstractExecutor):
        ...     def run(self, queue):
        ...         while (task := queue.take()) is not None:
        ...             queue.give(run_task(task))
    """

    @abc.abstractmethod
    def run(self, queue: TaskQueue) -> None:
        """Takes every step from the queue, runs it with `mergekit_ot.run_task`, and gives back what it found."""
