"""Rotations: which groups have them, that they keep the function, and that nothing larger does."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch
from attentions import Distant, Forgetful, Lone, NormedHeads, OneBlock
from library import library_sample
from rotating import MODELS, ROWS, TOKENS, Decoder, Heads, PostNorm, named_graph
from slow_ones import first_of
from torch import Tensor, nn

from mergekit_ot import ModelGraph, Orthogonal, OrthogonalWithFixedMean, Places, RotaryPlanes, trace_model
from mergekit_ot.graph.normal_form.find import find_normal_form
from mergekit_ot.graph.normal_form.form import NormalForm
from mergekit_ot.graph.symmetry.planted import PlantedProof, find_proven, planted_change
from mergekit_ot.graph.symmetry.proof import SENSITIVITY, TOLERANCE, Proof
from mergekit_ot.graph.symmetry.rotary import with_rotary_groups
from mergekit_ot.graph.symmetry.rotations import AbstractRotation
from mergekit_ot.graph.symmetry.transformation import Transformation
from mergekit_ot.testing import check_symmetry

Make = Callable[[], nn.Module]
# Streams, inner spaces of queries with keys, and of values with outputs; by hand.
ORTHOGONAL, FIXED_MEAN, ROTARY = "orthogonal", "orthogonal with fixed mean", "rotary"

# Network → how many groups each kind has: of the streams, one; of each attention, up to two spaces.
COUNTS: dict[str, tuple[Make, Tensor, dict[str, int]]] = {
    "gpt": (*MODELS["gpt"], {ORTHOGONAL: 4, FIXED_MEAN: 1, ROTARY: 0}),
    "llama": (*MODELS["llama"], {ORTHOGONAL: 3, FIXED_MEAN: 0, ROTARY: 2}),
    "one key head": (*MODELS["llama, grouped queries"], {ORTHOGONAL: 3, FIXED_MEAN: 0, ROTARY: 2}),
    "tied": (lambda: Decoder(is_tied=True), TOKENS, {ORTHOGONAL: 4, FIXED_MEAN: 0, ROTARY: 0}),
    "post norm": (PostNorm, ROWS, {ORTHOGONAL: 2, FIXED_MEAN: 0, ROTARY: 0}),
    "norms of queries and keys": (lambda: OneBlock(NormedHeads(True)), ROWS, {ORTHOGONAL: 2, ROTARY: 0}),
    "the same without gains": (lambda: OneBlock(NormedHeads(False)), ROWS, {ORTHOGONAL: 3, ROTARY: 0}),
    "with rotary positions": (lambda: OneBlock(NormedHeads(True, True)), ROWS, {ORTHOGONAL: 2, ROTARY: 0}),
    "the latter without gains": (lambda: OneBlock(NormedHeads(False, True)), ROWS, {ORTHOGONAL: 2, ROTARY: 1}),
    "alibi": (lambda: OneBlock(Distant()), ROWS, {ORTHOGONAL: 3, ROTARY: 0}),
    "a single head": (lambda: OneBlock(Lone()), ROWS, {ORTHOGONAL: 3, ROTARY: 0}),
    "several queries": (lambda: OneBlock(Heads(True, False, 1)), ROWS, {ORTHOGONAL: 3, ROTARY: 0}),
    "dropout": (lambda: OneBlock(Forgetful(), nn.LayerNorm), ROWS, {ORTHOGONAL: 2, FIXED_MEAN: 1, ROTARY: 0}),
}


# Whole networks take longest; two of them are enough by default.
WHOLE = ("gpt", "llama", "one key head", "tied", "dropout")


@pytest.mark.parametrize("name", [*first_of(WHOLE, 2), *(name for name in COUNTS if name not in WHOLE)])
def test_as_many_groups_as_by_hand_keep_the_contract(name: str) -> None:
    make, inputs, counts = COUNTS[name]
    for kind, count in counts.items():
        assert len(check_symmetry(kind, make, inputs, groups=count)) == count


def test_the_stream_and_the_spaces_are_the_ones_by_hand() -> None:
    make, inputs, _ = COUNTS["llama"]
    assert set(check_symmetry(ORTHOGONAL, make, inputs)) == {
        "embedding.weight:1",
        *(f"heads.{layer}.v.weight:0.1" for layer in (0, 1)),
    }
    assert set(check_symmetry(ROTARY, make, inputs)) == {f"heads.{layer}.q.weight:0.1" for layer in (0, 1)}


class Mixed(AbstractRotation):
    """Any invertible map, taken for a rotation: readers get it as makers do, or its inverse transpose."""

    name = "mixed"

    def guesses(self, graph: ModelGraph, proof: object) -> Mapping[str, Places]:
        return {}

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        element = Orthogonal().draw(size, generator)
        return element @ torch.diag(torch.linspace(0.5, 2.0, size, dtype=torch.float64))

    def act(self, block, place, element, power):
        return super().act(block, place, element if power == 1 else torch.linalg.inv(element).T, 1)


def normal_runs(make: Make, inputs: Tensor) -> tuple[ModelGraph, NormalForm, Proof, PlantedProof]:
    graph = named_graph(make, inputs)
    form = find_normal_form(graph, make, (inputs,))
    proof = PlantedProof(make, (inputs,), form=form)
    (draw, *_) = proof.draws_of(Orthogonal())
    return graph, form, draw, proof


def dual(graph: ModelGraph, key: str, places: Places) -> Places:
    """The places of a group, with the powers of an element that is not its own dual."""
    slots = graph.groups[key].places
    return {
        place: tuple(-power for power in powers) if slots[place].is_reader else powers
        for place, powers in places.items()
    }


@pytest.mark.parametrize(
    ("name", "kind", "larger"),
    [
        ("llama", ORTHOGONAL, Mixed()),
        ("gpt", FIXED_MEAN, Orthogonal()),
        ("gpt", FIXED_MEAN, Mixed()),
        ("llama", ROTARY, Orthogonal()),
        ("one key head", ROTARY, Orthogonal()),
    ],
)
def test_a_larger_kind_breaks_the_function(name: str, kind: str, larger: AbstractRotation) -> None:
    make, inputs, _ = COUNTS[name]
    graph, _, draw, proof = normal_runs(make, inputs)
    symmetry = {each.name: each for each in default_symmetries()}[kind]
    held = {
        key: dual(graph, key, places) if isinstance(larger, Mixed) else places
        for key, places in find_proven(symmetry, graph, proof).items()
        if kind == ROTARY or not graph.groups[key].context
    }
    held = {key: places for key, places in held.items() if kind == ROTARY or key in proof.normal_form.neutral}
    assert held
    for key, places in held.items():
        assert planted_change(draw, larger, graph, {key: places}) > SENSITIVITY * TOLERANCE
        readers = {place: (1,) for place, slot in graph.groups[key].places.items() if slot.is_reader}
        if readers:
            assert planted_change(draw, symmetry, graph, {key: readers}) > SENSITIVITY * TOLERANCE
    assert planted_change(draw, symmetry, graph, find_proven(symmetry, graph, proof)) <= TOLERANCE


def default_symmetries() -> list[AbstractRotation]:
    return [Orthogonal(), OrthogonalWithFixedMean(), RotaryPlanes()]


def test_a_rotation_holds_in_the_normal_form_alone() -> None:
    make, inputs, _ = COUNTS["llama"]
    graph, _, _, proof = normal_runs(make, inputs)
    stream = find_proven(Orthogonal(), graph, proof)
    assert planted_change(Proof(make, (inputs,), 0), Orthogonal(), graph, stream) > SENSITIVITY * TOLERANCE


def test_with_the_same_units_dropped_a_rotated_network_computes_the_same() -> None:
    make, inputs, _ = COUNTS["dropout"]
    graph, _, draw, proof = normal_runs(make, inputs)
    places = find_proven(Orthogonal(), graph, proof)
    model, rotated = make().double().train(), make().double().train()
    state = Transformation.random(Orthogonal(), graph, places, torch.Generator()).of_state(draw.state)
    model.load_state_dict(draw.state)
    rotated.load_state_dict(state)
    outputs = []
    for each in (model, rotated):
        torch.manual_seed(0)
        with torch.no_grad():
            outputs.append(each(inputs.double()))
    # Neither the probabilities nor what is written to the stream turns with a head: the same units are dropped.
    assert float((outputs[0] - outputs[1]).abs().max()) < 1e-9


# Network of the library → groups by kind, by hand; tied heads keep the streams as they are.
LIBRARY: dict[str, dict[str, int]] = {
    # Two layers, two spaces each; the head is the embedding, and so the stream stays.
    "gpt2_tied": {ORTHOGONAL: 4, FIXED_MEAN: 0, ROTARY: 0},
    # Grouped queries under rotary positions of one table: the stream, values per layer; planes per layer.
    "llama": {ORTHOGONAL: 3, FIXED_MEAN: 0, ROTARY: 2},
    "mixtral_eager": {ORTHOGONAL: 2, FIXED_MEAN: 0, ROTARY: 2},
    # The same with biases, and with queries, keys and values in one weight.
    "qwen2": {ORTHOGONAL: 3, FIXED_MEAN: 0, ROTARY: 2},
    "phi3": {ORTHOGONAL: 3, FIXED_MEAN: 0, ROTARY: 2},
    # Gains behind queries and keys stop their planes.
    "qwen3": {ORTHOGONAL: 3, FIXED_MEAN: 0, ROTARY: 0},
    "vit": {ORTHOGONAL: 4, FIXED_MEAN: 1, ROTARY: 0},
    # Normalised after each sum: only heads rotate.
    "bert_classifier": {ORTHOGONAL: 4, FIXED_MEAN: 0, ROTARY: 0},
    # Two encoder layers with one attention, two decoder layers with two, two spaces each; tied.
    "t5": {ORTHOGONAL: 12, FIXED_MEAN: 0, ROTARY: 0},
    # Three attentions; the encoder's stream begins behind a GELU, the decoder's is tied.
    "whisper": {ORTHOGONAL: 6, FIXED_MEAN: 0, ROTARY: 0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LIBRARY)
def test_networks_of_transformers(name: str) -> None:
    pytest.importorskip("transformers")
    sample = library_sample(name)
    inputs = sample.inputs()
    graph = with_rotary_groups(trace_model(sample.make(), inputs))
    proof = PlantedProof(sample.make, inputs, 0, graph)
    kinds = (Orthogonal(), OrthogonalWithFixedMean(), RotaryPlanes())
    assert {kind.name: len(find_proven(kind, graph, proof)) for kind in kinds} == LIBRARY[name]


def test_layers_that_share_a_table_of_angles_rotate_apart() -> None:
    pytest.importorskip("transformers")
    sample = library_sample("llama")
    graph = with_rotary_groups(trace_model(sample.make(), sample.inputs()))
    planes = {key: group for key, group in graph.pinned_groups.items() if "q_proj" in key}
    assert len(planes) == 2
    for key, group in planes.items():
        layer = key.split(".")[3]
        assert {slot.parameter.split(".")[3] for slot in group.members} == {layer}
        assert group.context == (f"model.model.layers.{layer}.self_attn.q_proj.weight:0.0",)
