"""Contests: one piece of work done in several ways in one process, in turn, and what each took."""

from __future__ import annotations

import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = "ours"
ROUNDS = 5
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Contest:
    """One piece of work.

    Attributes:
        work: What is done.
        arms: Who does it → how; one of them is `OURS`. Each starts from the same weights.
        outcome: Says, from what each arm returned, how good the results are.
    """

    work: str
    arms: Mapping[str, Callable[[], Any]]
    outcome: Callable[[Mapping[str, Any]], str]


@dataclass(frozen=True)
class Row:
    """What one arm of a contest took beside ours.

    Attributes:
        work: What was done.
        arm: Who did it.
        seconds: Median of its CPU time.
        ratio: Our CPU time over it.
        peak_mib: What its memory grew by at most, by itself; and by how much ours did.
        our_peak_mib: The same of ours.
        outcome: How good the results were.
    """

    work: str
    arm: str
    seconds: float
    ratio: float
    peak_mib: float
    our_peak_mib: float
    outcome: str


def cpu_seconds() -> float:
    """Returns the CPU time of this process and of those that it started and that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def peak_of(work: Callable[[], object]) -> float:
    """Returns by how many MiB memory grows while something is done, in a process of its own."""
    reading, writing = os.pipe()
    process = os.fork()
    if not process:
        status = 1
        try:
            before = _forget_peak()
            work()
            started = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
            os.write(writing, str(max(_memory("VmHWM") - before, started)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    os.waitpid(process, 0)
    return float(text) / 1024 if text else float("nan")


def _forget_peak() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1])


def medians(arms: Mapping[str, Callable[[], object]], rounds: int = ROUNDS) -> dict[str, float]:
    """Returns the median CPU time of each arm, all run in turn, after one round that is not counted."""
    spent: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, work in arms.items():
            start = cpu_seconds()
            work()
            if number:
                spent[name].append(cpu_seconds() - start)
    return {name: statistics.median(times) for name, times in spent.items()}


def held(contest: Contest, rounds: int = ROUNDS) -> list[Row]:
    """Holds a contest, and returns a row for each arm beside ours.

    Args:
        contest: The contest.
        rounds: How often each arm is run and counted.
    """
    outcome = contest.outcome({name: work() for name, work in contest.arms.items()})
    peaks = {name: peak_of(work) for name, work in contest.arms.items()}
    times = medians(contest.arms, rounds)
    return [
        Row(contest.work, name, times[name], times[OURS] / times[name], peaks[name], peaks[OURS], outcome)
        for name in contest.arms
        if name != OURS
    ]


def table(rows: Iterable[Row]) -> str:
    """Returns rows as a table in Markdown."""
    lines = ["| work | beside | its CPU s | ours / it | MiB, ours / it | outcome |", "|---|---|---:|---:|---:|---|"]
    for row in rows:
        memory = f"{row.our_peak_mib:.0f} / {row.peak_mib:.0f}"
        cells = (row.work, row.arm, f"{row.seconds:.3g}", f"{row.ratio:.2f}", memory, row.outcome)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
