"""What an executor is: it takes the steps of a sweep as they become ready, and gives back what they found."""

from __future__ import annotations

import abc
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from mergekit_ot.errors import SolverError
from mergekit_ot.fusion.task import StepSolution, StepTask

if TYPE_CHECKING:
    import networkx as nx


class TaskQueue:
    """The steps of one sweep: what is ready is taken, what was found is given back, and more becomes ready.

    Args:
        steps: Number of each step → those that it waits for, in the order of the sweep; or the same as a graph.
        make: Gives the task of a step; called when it is taken, so that it holds all couplings of its predecessors.
        accept: Takes a solution.

    Example:
        >>> queue = TaskQueue({0: [], 1: [], 2: [0, 1]}, make=lambda number: number, accept=lambda solution: None)
        >>> queue.take(), queue.take(), queue.take()
        (0, 1, None)
        >>> [queue.give(StepSolution(number, {}, ())) for number in (1, 0)] and queue.take()
        2
    """

    def __init__(
        self,
        steps: Mapping[int, Collection[int]] | nx.DiGraph,
        make: Callable[[int], StepTask],
        accept: Callable[[StepSolution], None],
    ) -> None:
        self._make, self._accept = make, accept
        waits = steps if isinstance(steps, Mapping) else {number: list(steps.predecessors(number)) for number in steps}
        self._waits = {number: set(waits[number]) for number in _in_generations(waits)}
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


def _in_generations(waits: Mapping[int, Collection[int]]) -> list[int]:
    """Returns the steps in the order in which they become ready if all that are ready are done together.

    Raises:
        SolverError: Some wait for each other.
    """
    behind: dict[int, list[int]] = {number: [] for number in waits}
    for number, earlier in waits.items():
        for before in earlier:
            behind[before].append(number)
    left = {number: len(earlier) for number, earlier in waits.items()}
    order = [number for number, count in left.items() if not count]
    for number in order:  # grows meanwhile
        for later in behind[number]:
            left[later] -= 1
            if not left[later]:
                order.append(later)
    if len(order) < len(waits):
        raise SolverError(f"Steps {sorted(waits.keys() - set(order))} wait for each other, so that none can be taken.")
    return order


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
