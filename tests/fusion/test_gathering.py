"""Families that only change places are moved by one gather: the same numbers as one member after the other."""

from __future__ import annotations

import pytest
import torch
from random_networks.block import IMAGES, LINES, NetworkDescription
from random_networks.network import inputs_of, made
from signed import randomised

from mergekit_ot import Permutation, fuse
from mergekit_ot.fusion import moving
from mergekit_ot.fusion.alignment import Alignment, FamilyCoupling
from mergekit_ot.fusion.families import kept_up
from mergekit_ot.fusion.moving import transport_parameter

NETWORKS: dict[str, NetworkDescription] = {
    "groups in groups": (IMAGES, "linear", (("GroupsInGroups", ((3, 2), "none", "norm", True), ()),), "mean"),
    "queries": (LINES, "linear", (("GroupedQueries", ((6, 3), "none", False, True), ()),), "mean"),
    "convolutions": (IMAGES, "linear", (("Convolution", (3, 3, 24, False), ()), ("Norm", ("group", 2), ())), "mean"),
}


def in_random_order(alignment: Alignment, seed: int) -> Alignment:
    """An alignment in which every group, and every member of every family, has an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    groups = alignment.target.groups

    def order(key: str) -> Permutation:
        return Permutation(torch.randperm(groups[key].size, generator=generator))

    for key in sorted(alignment.couplings, key=lambda each: len(groups[each].context)):
        held = alignment.couplings[key][1]
        is_family = isinstance(held, FamilyCoupling)
        drawn = FamilyCoupling({pairs: order(key) for pairs in held.members}) if is_family else order(key)
        alignment = alignment.with_couplings({key: (alignment.couplings[key][0], drawn)})
        alignment = alignment.with_couplings(kept_up(alignment, key))
    return alignment


@pytest.mark.parametrize("name", NETWORKS)
def test_a_gather_moves_as_one_member_after_the_other_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    description = NETWORKS[name]
    models = [randomised(made(description), seed) for seed in range(2)]
    result = fuse(models, solver="average", example_inputs=inputs_of(description), device="cpu")
    alignment = in_random_order(result.alignment, 3)
    state = models[1].state_dict()
    names = [key for key in alignment.target.layouts if key in state]
    at_once = {key: transport_parameter(state[key], key, alignment, 1) for key in names}
    asked: list[str] = []

    def refuse(*_: object) -> None:
        asked.append(name)

    monkeypatch.setattr(moving, "gathered", refuse)
    one_by_one = {key: transport_parameter(state[key], key, alignment, 1) for key in names}
    assert asked
    assert all(torch.equal(at_once[key], one_by_one[key]) for key in names)
    assert any(not torch.equal(at_once[key], state[key]) for key in names)
