"""One step after the other, in this process."""

from __future__ import annotations

from mergekit_ot import AbstractExecutor, TaskQueue, run_task


class SerialExecutor(AbstractExecutor):
    """Runs the steps in the order of the sweep."""

    def run(self, queue: TaskQueue) -> None:
        """Runs each step when it is ready, and gives back what it found."""
        while (task := queue.take()) is not None:
            queue.give(run_task(task))
