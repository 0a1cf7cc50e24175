"""Families are coupled member by member or all members at once: the same couplings."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from random_networks.block import IMAGES, LINES, NetworkDescription
from random_networks.network import inputs_of, made
from signed import randomised

from mergekit_ot import fuse
from mergekit_ot.fusion import families, nested
from mergekit_ot.fusion.alignment import Alignment, FamilyCoupling

NETWORKS: dict[str, NetworkDescription] = {
    "groups in groups": (IMAGES, "linear", (("GroupsInGroups", ((3, 2), "none", "norm", True), ()),), "mean"),
    "queries": (LINES, "linear", (("GroupedQueries", ((6, 3), "none", False, True), ()),), "mean"),
    "convolutions": (IMAGES, "linear", (("Convolution", (3, 3, 24, False), ()), ("Norm", ("group", 2), ())), "mean"),
}


def orders(alignment: Alignment) -> Iterator[tuple[str, int, object, list[int]]]:
    for key, couplings in alignment.couplings.items():
        for source, found in enumerate(couplings):
            members = found.members if isinstance(found, FamilyCoupling) else {(): found}
            for pairs, member in members.items():
                yield key, source, pairs, member.partners().tolist()


@pytest.mark.parametrize("solver", ["wb", "weight-matching"])
@pytest.mark.parametrize("name", NETWORKS)
def test_members_are_coupled_at_once_as_one_by_one(name: str, solver: str, monkeypatch: pytest.MonkeyPatch) -> None:
    description = NETWORKS[name]
    models = [randomised(made(description), seed) for seed in range(2)]
    inputs, asked = inputs_of(description), []
    real = families.coupled_members
    monkeypatch.setattr(families, "coupled_members", lambda *given: (asked.append(name), real(*given))[1])
    at_once = fuse(models, solver=solver, example_inputs=inputs, device="cpu")
    assert asked
    monkeypatch.setattr(families, "_come_at_once", lambda *_: False)
    costs = nested._costs_of_one_family
    monkeypatch.setattr(nested, "_costs_of_one_family", lambda *given: (costs(*given)[0], None))
    one_by_one = fuse(models, solver=solver, example_inputs=inputs, device="cpu")
    assert [each.cost for each in at_once.groups] == pytest.approx([each.cost for each in one_by_one.groups], rel=1e-4)
    assert sorted(map(repr, orders(at_once.alignment))) == sorted(map(repr, orders(one_by_one.alignment)))
    assert any(row != sorted(row) for *_, row in orders(at_once.alignment))


def test_a_family_knows_its_partners_by_the_fused_index() -> None:
    models = [randomised(made(NETWORKS["convolutions"]), seed) for seed in range(2)]
    found = fuse(models, solver="wb", example_inputs=inputs_of(NETWORKS["convolutions"]), device="cpu").alignment
    held = [each for each in found.couplings.values() if isinstance(each[1], FamilyCoupling)]
    assert held
    for family in (couplings[1] for couplings in held):
        assert isinstance(family, FamilyCoupling)
        assert family.partners is not None
        for pairs, member in family.members.items():
            assert torch.equal(family.partners[tuple(fused for fused, _ in pairs)], member.partners())
