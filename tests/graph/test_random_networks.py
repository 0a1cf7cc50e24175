"""The planted-order law on random networks: what propagation calls free never has to be pinned by the proof.

A network is drawn as nested tuples, so that it can be built again at will, and shrinks to what matters. Widths are 12
and 24, which have many divisors: heads, groups, halves and slices of different sizes meet in nearly every example.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from random_networks.block import IMAGES, LINES, NetworkDescription, kinds
from random_networks.network import checked, kinds_in, networks


def law(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )


def holds(description: NetworkDescription) -> None:
    report = checked(description)
    assert report.culprits == ()
    assert report.preserved in (True, None)


@law(12)
@given(networks())
def test_no_random_network_breaks_the_function(description: NetworkDescription) -> None:
    holds(description)


@pytest.mark.slow
@law(20)
@given(networks())
def test_no_further_random_network_breaks_the_function(description: NetworkDescription) -> None:
    holds(description)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(4))
def test_no_deep_random_network_breaks_the_function(number: int) -> None:
    """In several parts, which processes share."""

    @seed(number)
    @law(8)
    @given(networks(depth=3, longest=4))
    def part(description: NetworkDescription) -> None:
        holds(description)

    part()


def drawn(examples: int) -> list[NetworkDescription]:
    """Returns what is drawn from a fixed seed."""
    found: list[NetworkDescription] = []

    @settings(law(examples), phases=[Phase.generate])
    @given(networks())
    def collect(description: NetworkDescription) -> None:
        found.append(description)

    collect()
    return found


def test_every_kind_of_block_is_drawn() -> None:
    found = drawn(200)
    counts = Counter(kind for _, _, chain, _ in found for kind in kinds_in(chain))
    assert set(counts) == set(kinds())
    assert {family for family, _, _, _ in found} == {LINES, IMAGES}
    assert {head for _, _, _, head in found} == {"places", "mean", "flatten", "table"}


@pytest.mark.slow
def test_most_random_networks_have_certified_groups() -> None:
    """A law about networks in which nothing may move would say nothing."""
    reports = [checked(description) for description in drawn(15)]
    certified = [report.groups > 0 and report.certified > 0 for report in reports]
    assert sum(certified) > 0.8 * len(certified)
