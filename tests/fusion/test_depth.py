"""Sources of different depth: deepening keeps the function to the bit, and finds the blocks that correspond."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from depth_nets import IMAGES, NETS, ROWS, TOKENS, Convolutional, Transformer, filled, perceptron
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mergekit_ot import SourceModel, deepen, fuse
from mergekit_ot.errors import GraphMismatchError, RecipeError
from mergekit_ot.fusion.depth.matching import match_in_order
from mergekit_ot.fusion.depth.series import depth_difference
from mergekit_ot.fusion.depth.sources import deepest

KINDS = sorted(NETS)


def planted(kind: str, own: nn.Module, places: Sequence[int], depth: int) -> nn.Module:
    """Returns a deeper network that computes the same: blocks of an own one at some places, zeros at the others."""
    make, _ = NETS[kind]
    deep = make(depth)
    ours, theirs = (blocks_of(model) for model in (own, deep))
    rest = dict(own.named_modules())
    for name, module in deep.named_children():
        source = rest.get(name)
        if source is not None and type(source) is type(module) and not list(module.children()):
            module.load_state_dict(source.state_dict())
    if isinstance(own, nn.Sequential):
        for ours_at, theirs_at in ((0, 0), (-2, -2), (-1, -1)):
            deep[theirs_at].load_state_dict(own[ours_at].state_dict())
    for number, block in enumerate(theirs):
        block.load_state_dict(ours[places.index(number)].state_dict() if number in places else ours[0].state_dict())
        if number not in places:
            for parameter in block.parameters():
                nn.init.zeros_(parameter)
    return deep.eval()


def blocks_of(model: nn.Module) -> list[nn.Module]:
    if isinstance(model, Convolutional):
        return list(model.layer1)
    return list(model.blocks) if isinstance(model, Transformer) else list(model.children())[1:-2]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(depth=st.integers(1, 3), more=st.integers(1, 3), seed=st.integers(0, 99), has_data=st.booleans())
def test_deepening_keeps_the_function_to_the_bit(kind: str, depth: int, more: int, seed: int, has_data: bool) -> None:
    make, inputs = NETS[kind]
    shallow, deep = filled(make(depth), seed), filled(make(depth + more), seed + 1)
    deepened = deepen(shallow, deep, example_inputs=inputs, data=[inputs] if has_data else [])
    assert len(deepened.inserted) == more
    assert [own for own in deepened.blocks.values() if own is not None] == list(names_of_blocks(shallow))
    assert deepened.seen_by == ("calibration data" if has_data else "weights")
    with torch.no_grad():
        assert torch.equal(deepened.model.instance()(inputs), shallow(inputs))


def names_of_blocks(model: nn.Module) -> list[str]:
    own = {id(block) for block in blocks_of(model)}
    return [name for name, module in model.named_modules() if id(module) in own]


@pytest.mark.parametrize(("kind", "has_data"), [*((kind, False) for kind in KINDS), ("perceptron", True)])
def test_a_planted_deepened_copy_fused_with_its_source_gives_itself_back(kind: str, has_data: bool) -> None:
    make, inputs = NETS[kind]
    own, places = filled(make(2), 3), (1, 2)
    deep = planted(kind, own, places, 4)
    with torch.no_grad():
        assert torch.equal(deep(inputs), own(inputs))
    result = fuse([own, deep], example_inputs=inputs, data=[inputs] if has_data else None)
    (deepened,) = result.deepened
    found = [number for number, block in enumerate(deepened.blocks.values()) if block is not None]
    assert found == list(places)
    assert all(torch.equal(result.state[name], tensor) for name, tensor in deep.state_dict().items())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_matching_in_order_agrees_with_brute_force(data: st.DataObject) -> None:
    own = data.draw(st.integers(1, 4))
    other = data.draw(st.integers(own, 6))
    cost = st.one_of(st.floats(0, 10), st.just(float("inf")))
    costs = torch.tensor(
        data.draw(st.lists(st.lists(cost, min_size=other, max_size=other), min_size=own, max_size=own))
    )
    found = match_in_order(costs)
    every = {places: total(costs, places) for places in itertools.combinations(range(other), own)}
    least = min(every.values())
    assert (found is None) == (least == float("inf"))
    if found is not None:
        assert total(costs, found) == pytest.approx(least)
        assert list(found) == sorted(set(found))


def total(costs: Tensor, places: Sequence[int]) -> float:
    return sum(float(costs[own, place]) for own, place in enumerate(places))


def test_the_fused_network_is_as_deep_as_the_deepest_whatever_the_order() -> None:
    shallow, deep = filled(perceptron(2), 0), filled(perceptron(4), 1)
    one, other = (fuse(nets, example_inputs=ROWS) for nets in ([shallow, deep], [deep, shallow]))
    for result in (one, other):
        assert list(result.state) == list(deep.state_dict())
        assert result.aligned_sources_max_error == pytest.approx(0.0, abs=1e-5)
        assert "as deep as the deepest" in " ".join(result.notes)
        assert [deepening.model.name for deepening in result.deepened] == ["source 0" if result is one else "source 1"]
    named = fuse([shallow, deep], example_inputs=ROWS, target=1)
    assert all(torch.equal(named.state[name], tensor) for name, tensor in one.state.items())


def test_one_weight_gives_the_deepened_source_itself() -> None:
    shallow, deep = filled(Convolutional(1), 0), filled(Convolutional(3), 1)
    result = fuse([shallow, deep], example_inputs=IMAGES, model_weights=[1.0, 0.0])
    with torch.no_grad():
        assert torch.allclose(result.model()(IMAGES), shallow(IMAGES), atol=1e-5)


def test_sources_become_as_deep_as_a_target_without_weights() -> None:
    sources = [filled(perceptron(depth), depth) for depth in (1, 2)]
    target = SourceModel("deep", lambda: perceptron(4))
    result = fuse(sources, example_inputs=ROWS, target=target)
    assert [deepening.seen_by for deepening in result.deepened] == ["places", "places"]
    assert result.aligned_sources_max_error == pytest.approx(0.0, abs=1e-5)


def test_a_target_with_fewer_blocks_than_a_source_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'short' has fewer blocks than 'source 1'.*--target 1"):
        fuse(
            [filled(perceptron(2), 0), filled(perceptron(3), 1)],
            example_inputs=ROWS,
            target=SourceModel("short", lambda: perceptron(1)),
        )


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda depth: Transformer(depth, is_post=True), TOKENS),
        (lambda depth: nn.Sequential(*(nn.Linear(5, 5) for _ in range(depth))), ROWS),
    ],
    ids=["norms behind the sums", "a chain"],
)
def test_blocks_that_do_not_only_add_are_refused(make: type[nn.Module], inputs: Tensor) -> None:
    nets = [filled(make(depth), depth) for depth in (2, 3)]
    with pytest.raises(GraphMismatchError, match=r"depth differs: source 0 has 2 layers.*replace or normalise") as told:
        fuse(nets, example_inputs=inputs)
    assert "of source 1" in str(told.value)


@pytest.mark.parametrize("deep", [perceptron(3, width=7), perceptron(1), Convolutional(3)])
def test_networks_that_differ_by_more_than_blocks_are_not_deepened(deep: nn.Module) -> None:
    with pytest.raises(GraphMismatchError, match="differ by more than blocks"):
        deepen(perceptron(2), deep, example_inputs=ROWS)


def test_of_two_networks_each_deeper_in_another_stage_none_is_the_deepest() -> None:
    names = [f"layer{stage}.{block}.weight" for stage in (1, 2) for block in range(3)]
    one, other = ({name: torch.empty(2, 2) for name in names if name != out} for out in (names[2], names[5]))
    assert deepest([one, other]) is None
    assert deepest([one, dict.fromkeys(names, torch.empty(2, 2))]) == 1


def test_blocks_of_another_kind_are_matched_to_their_own_kind() -> None:
    wide = {f"1.{place}.weight": torch.Size([4, 4]) for place in range(4)} | {"1.0.weight": torch.Size([4, 2])}
    few = {name: shape for name, shape in wide.items() if name[:3] not in ("1.2", "1.3")}
    found = depth_difference(few, wide)
    assert found is not None
    assert found.series[0].is_possible.tolist() == [[True, False, False, False], [False, True, True, True]]
    # The block that widens the stream cannot stand anywhere but first.
    assert depth_difference({"1.0.weight": torch.Size([3, 3])}, wide) is None
