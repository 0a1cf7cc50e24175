"""Families (groups of channels, heads) over several sweeps: their outer order changes, and they keep up with it."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mergekit_ot import FusionResult, Permutation, Plan, fuse
from mergekit_ot.fusion.alignment import Alignment, FamilyCoupling
from mergekit_ot.fusion.families import coupled_pairs, kept_up


class GroupedConvolutions(nn.Module):
    """Two grouped convolutions one after the other, that is in which each group reads channels of several others."""

    def __init__(self, groups: int, per_group: int) -> None:
        super().__init__()
        width = groups * per_group
        self.inside = nn.Conv2d(2, width, 1)
        self.first = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.middle = nn.Conv2d(width, width, 1)
        self.second = nn.Conv2d(width, width, 3, padding=1, groups=groups)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(F.relu(self.inside(x))))
        return self.head(F.relu(self.second(F.relu(self.middle(x))))).mean((2, 3))


class NormalisedStream(nn.Module):
    """A residual stream that is read by a GroupNorm."""

    def __init__(self, groups: int, per_group: int) -> None:
        super().__init__()
        width = groups * per_group
        self.inside = nn.Conv2d(2, width, 3, padding=1)
        self.norm = nn.GroupNorm(groups, width)
        self.branch = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        x = x + self.branch(F.relu(self.norm(x)))
        return self.head(F.relu(x)).mean((2, 3))


class GroupedQueries(nn.Module):
    """Two layers of attention in which several query heads share a key head."""

    def __init__(self, groups: int, per_group: int) -> None:
        super().__init__()
        self.keys, self.share, self.size = groups, per_group, 3
        width, heads = 8, groups * per_group
        self.inside = nn.Linear(4, width)
        self.query = nn.ModuleList(nn.Linear(width, heads * self.size, bias=False) for _ in range(2))
        self.key = nn.ModuleList(nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        self.value = nn.ModuleList(nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        self.out = nn.ModuleList(nn.Linear(heads * self.size, width, bias=False) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x.flatten(2).transpose(1, 2))
        for query, key, value, out in zip(self.query, self.key, self.value, self.out, strict=True):
            batch, length, _ = x.shape
            queries = query(x).view(batch, length, self.keys * self.share, self.size).transpose(1, 2)
            keys = key(x).view(batch, length, self.keys, self.size).transpose(1, 2)
            values = value(x).view(batch, length, self.keys, self.size).transpose(1, 2)
            seen = F.scaled_dot_product_attention(queries, keys, values, enable_gqa=True)
            x = x + out(seen.transpose(1, 2).reshape(batch, length, -1))
        return self.head(x.mean(1))


KINDS: dict[str, tuple[Callable[[int, int], nn.Module], tuple[int, ...]]] = {
    "grouped convolutions": (GroupedConvolutions, (2, 2, 5, 5)),
    "normalised stream": (NormalisedStream, (2, 2, 5, 5)),
    "grouped queries": (GroupedQueries, (2, 4, 3, 2)),
}
METHODS: tuple[dict[str, object], ...] = (
    {"solver": "weight-matching"},
    {"solver": "weight-matching", "refine": True},
    {"solver": "wb", "refine": True},
    {"solver": "gwb", "refine": True, "solver_options": {"random_starts": 1}},
)


def drawn(kind: str, sizes: tuple[int, int], count: int, seed: int) -> list[nn.Module]:
    torch.manual_seed(seed)
    return [KINDS[kind][0](*sizes).eval() for _ in range(count)]


def fused(kind: str, models: list[nn.Module], method: dict[str, object]) -> FusionResult:
    inputs = torch.randn(KINDS[kind][1], generator=torch.Generator().manual_seed(0))
    return fuse(models, example_inputs=inputs, device="cpu", **method)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.sampled_from([(2, 2), (3, 2), (2, 3), (4, 2)]),
    count=st.integers(2, 3),
    seed=st.integers(0, 2**20),
    method=st.sampled_from(METHODS),
)
def test_no_sweep_asks_a_family_for_what_nobody_solved(
    kind: str, sizes: tuple[int, int], count: int, seed: int, method: dict[str, object]
) -> None:
    models = drawn(kind, sizes, count, seed)
    result = fused(kind, models, method)
    assert result.aligned_sources_max_error < 1e-4
    assert any(group.solver == "nested assignment" for group in result.groups)
    if method.get("refine"):
        objectives = result.objectives
        assert objectives["after refinement"] <= objectives["before refinement"] * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_matching_recovers_a_planted_order_of_families(kind: str) -> None:
    (model,) = drawn(kind, (3, 2), 1, 7)
    result = fused(kind, [model, model], {"solver": "weight-matching"})
    for name, value in model.state_dict().items():
        torch.testing.assert_close(result.state[name], value, rtol=1e-5, atol=1e-6)


@functools.cache
def alignment_of(kind: str, sizes: tuple[int, int]) -> tuple[Alignment, str, str]:
    """Two sources at the identity, the key of an outer group and that of a family indexed by it."""
    result = fused(kind, drawn(kind, sizes, 2, 1), {"solver": "average"})
    groups = result.alignment.target.groups
    family = next(key for key, group in groups.items() if group.context and group.is_free)
    return result.alignment, groups[family].context[0], family


def test_pairs_that_were_solved_keep_their_member_and_others_take_that_of_their_fused_neuron() -> None:
    alignment, outer, family = alignment_of("normalised stream", (3, 2))
    order = Permutation(torch.tensor([1, 0]))
    held = FamilyCoupling({((j, j),): order if j == 1 else Permutation.identity(2) for j in range(3)})
    alignment = alignment.with_couplings({family: (held, held)})
    turned = Permutation(torch.tensor([0, 2, 1]))
    alignment = alignment.with_couplings({outer: (Permutation.identity(3), turned)})
    unmoved, moved = kept_up(alignment, outer)[family]
    assert unmoved is held
    assert moved.members.keys() == {((0, 0),), ((1, 2),), ((2, 1),)}
    assert moved.members[((1, 2),)].is_same(order)
    assert moved.members[((2, 1),)].is_same(Permutation.identity(2))


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(3)), st.booleans())
def test_a_family_has_a_member_at_every_pair_that_is_coupled(order: list[int], is_soft: bool) -> None:
    alignment, outer, family = alignment_of("normalised stream", (3, 2))
    coupling = Permutation(torch.tensor(order))
    if is_soft:
        coupling = Plan(0.5 * coupling.transport_plan() + 0.5 * torch.eye(3) / 3)
    alignment = alignment.with_couplings({outer: (Permutation.identity(3), coupling)})
    for source, found in enumerate(kept_up(alignment, outer).get(family, alignment.couplings[family])):
        wanted = coupled_pairs(alignment, alignment.target.groups[family].context, source)
        assert isinstance(found, FamilyCoupling)
        assert set(found.members) == set(wanted)


def test_what_is_not_indexed_by_the_group_is_left_alone() -> None:
    alignment, outer, family = alignment_of("normalised stream", (3, 2))
    others = [key for key in alignment.couplings if key not in (outer, family)]
    assert outer in alignment.target.groups[family].context
    assert all(set(kept_up(alignment, key)) <= _indexed_by(alignment, key) for key in [outer, *others])


def _indexed_by(alignment: Alignment, key: str) -> set[str]:
    groups = alignment.target.groups
    indexed = {key}
    for _ in itertools.repeat(None, len(groups)):
        indexed |= {name for name, group in groups.items() if indexed & set(group.context)}
    return indexed - {key}
