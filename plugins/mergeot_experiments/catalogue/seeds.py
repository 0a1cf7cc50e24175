"""Sets of sources: the same trainings from different seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mergeot_experiments.sources.training import Training


def windows(seeds: Sequence[int], length: int, count: int) -> tuple[tuple[int, ...], ...]:
    """Returns runs of consecutive seeds, the last ones going on at the beginning.

    Example:
        >>> windows((3, 5, 7), length=2, count=3)
        ((3, 5), (5, 7), (7, 3))
    """
    runs = []
    for start in range(count):
        runs.append(tuple(seeds[(start + step) % len(seeds)] for step in range(length)))
    return tuple(runs)


def seeded(trainings: Sequence[Training], seeds: Sequence[Sequence[int]]) -> tuple[tuple[Training, ...], ...]:
    """Returns sets of sources: the trainings in order, each with a seed of the set's own.

    Args:
        trainings: One for each source of a set.
        seeds: For each set, one seed for each source.
    """
    sets = []
    for of_set in seeds:
        sets.append(tuple(replace(training, seed=seed) for training, seed in zip(trainings, of_set, strict=True)))
    return tuple(sets)
