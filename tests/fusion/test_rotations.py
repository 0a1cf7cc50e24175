"""The laws of a fusion where residual streams and heads may be rotated: what was planted is found."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from library import library_sample
from mergeot_matching.solver import WeightMatchingSolver
from rotating import MODELS, ROWS, TOKENS, Decoder, PostNorm, apart, planted_copy, seeded
from slow_ones import first_of
from torch import nn

from mergekit_ot import InvertibleMap, barrier, fuse
from mergekit_ot.fusion.alignment import FamilyCoupling
from mergekit_ot.fusion.tensors import SourceTensors, alignment_objective
from mergekit_ot.transport.measure import ROTATIONS

SOLVER = "weight-matching"


def is_rotated(couplings: tuple[object, ...]) -> bool:
    members = [m for each in couplings for m in (each.members.values() if isinstance(each, FamilyCoupling) else [each])]
    return any(isinstance(member, InvertibleMap) for member in members)


@pytest.mark.parametrize("name", MODELS)
def test_a_planted_copy_is_found_and_the_midpoint_is_the_source(name: str) -> None:
    make, inputs = MODELS[name]
    model = seeded(make, 1)
    copy = planted_copy(model, make, inputs)
    assert apart(model, copy, inputs) < 1e-10
    result = fuse([model, copy], solver=SOLVER, example_inputs=inputs)
    assert apart(model, result.model(), inputs) < 1e-6
    assert result.aligned_sources_max_error is not None
    assert result.aligned_sources_max_error < 1e-6
    rotated = [key for key, couplings in result.alignment.couplings.items() if is_rotated(couplings)]
    assert set(rotated) == set(result.alignment.rotations)
    assert len(rotated) >= 1 + 2 * 2  # the stream, and of each layer at least queries with keys, values with outputs


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_three_planted_copies_are_found(name: str) -> None:
    make, inputs = MODELS[name]
    model = seeded(make, 1)
    copies = [planted_copy(model, make, inputs, seed) for seed in (3, 4)]
    result = fuse([copies[0], model, copies[1]], solver=SOLVER, example_inputs=inputs)
    assert apart(model, result.model(), inputs) < 1e-6


@pytest.mark.parametrize("name", first_of(MODELS))
def test_aligned_sources_compute_what_the_sources_compute(name: str) -> None:
    make, inputs = MODELS[name]
    models = [seeded(make, seed) for seed in (1, 2)]
    result = fuse(models, solver=SOLVER, example_inputs=inputs)
    for number, model in enumerate(models):
        aligned = result.models.target.instance(result.aligned_state(number))
        assert apart(model, aligned, inputs) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_one_hot_weights_return_that_source(name: str) -> None:
    make, inputs = MODELS[name]
    models = [seeded(make, seed) for seed in (1, 2)]
    for number, weights in enumerate(((1.0, 0.0), (0.0, 1.0))):
        result = fuse(models, solver=SOLVER, example_inputs=inputs, model_weights=weights)
        assert apart(models[number], result.model(), inputs) < 1e-9


def test_a_network_with_itself_is_itself() -> None:
    make, inputs = MODELS["llama"]
    model = seeded(make, 1)
    assert apart(model, fuse([model, model], solver=SOLVER, example_inputs=inputs).model(), inputs) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_sweep_never_ends_farther_apart(name: str) -> None:
    make, inputs = MODELS[name]
    models = [seeded(make, seed) for seed in (1, 2)]

    def objective(sweeps: int) -> float:
        @dataclass(frozen=True)
        class Limited(WeightMatchingSolver):
            max_sweeps = sweeps

        result = fuse(models, solver=Limited(), example_inputs=inputs)
        tensors = SourceTensors(result.models.sources, torch.device("cpu"))
        found = alignment_objective(tensors, result.alignment, (0.5, 0.5))
        assert found is not None
        return found

    objectives = [objective(sweeps) for sweeps in (1, 2, 3, 20)]
    assert all(after <= before * (1 + 1e-9) for before, after in itertools.pairwise(objectives))
    assert objectives[-1] < objectives[0]


def test_the_option_says_what_neurons_may_do() -> None:
    make, inputs = MODELS["llama"]
    models = [seeded(make, seed) for seed in (1, 2)]
    for symmetry in ("permutation", "sign", "all"):
        result = fuse(models, solver=SOLVER, example_inputs=inputs, solver_options={"symmetry": symmetry})
        assert bool(result.alignment.rotations) == (symmetry == "all")
        assert bool(result.alignment.signs) == (symmetry != "permutation")
        # Only for rotations are the sources rewritten.
        assert (result.models.normal is not None) == (symmetry == "all")
        # What rotates counts as aligned.
        extent = result.extent
        assert (extent.aligned == extent.groups and extent.reasons == ()) == (symmetry == "all")


def test_a_post_norm_stream_keeps_to_orders() -> None:
    models = [seeded(PostNorm, seed) for seed in (1, 2)]
    result = fuse(models, solver=SOLVER, example_inputs=ROWS.double())
    streams = [key for key in result.alignment.rotations if not result.alignment.target.groups[key].context]
    assert streams == []
    assert apart(models[1], result.models.target.instance(result.aligned_state(1)), ROWS) < 1e-9


class TestTiedEmbeddings:
    """A head that is the embedding is aligned apart from it, and is the embedding again in the result."""

    def models(self) -> list[nn.Module]:
        return [seeded(lambda: Decoder(is_tied=True), seed) for seed in (1, 2)]

    def test_the_result_is_tied_and_fits_the_architecture_on_a_path_of_true_ends(self) -> None:
        models = self.models()
        result = fuse(models, solver=SOLVER, example_inputs=TOKENS)
        assert torch.equal(result.state["head.weight"], result.state["embedding.weight"])
        assert any(not result.alignment.target.groups[key].context for key in result.alignment.rotations)
        for number, model in enumerate(models):
            aligned = result.aligned_module()
            aligned.load_state_dict(result.aligned_state(number))
            assert apart(model, aligned, TOKENS) < 1e-9
        targets = TOKENS.roll(-1, 1)
        ends = [result.aligned_state(number) for number in (0, 1)]
        curve = barrier(result.aligned_module(), *ends, [(TOKENS, targets)], points=3)
        own = barrier(Decoder(is_tied=True).double(), *(m.state_dict() for m in models), [(TOKENS, targets)], points=3)
        assert curve["loss"][0] == pytest.approx(own["loss"][0])
        assert curve["loss"][2] == pytest.approx(own["loss"][2])

    def test_a_network_with_itself_is_itself(self) -> None:
        model = self.models()[0]
        result = fuse([model, model], solver=SOLVER, example_inputs=TOKENS)
        assert apart(model, result.model(), TOKENS) < 1e-9

    @pytest.mark.slow
    def test_untied_it_stays_apart(self) -> None:
        from mergekit_ot import FusionInputs, FusionOptions, fuse_with

        options = FusionOptions(solver=SOLVER, untie=True)
        result = fuse_with(FusionInputs(self.models(), example_inputs=TOKENS), options)
        assert not torch.equal(result.state["head.weight"], result.state["embedding.weight"])
        assert result.model()(TOKENS).isfinite().all()


def test_every_name_of_a_rotation_is_a_registered_symmetry() -> None:
    from mergekit_ot import default_manager

    assert set(ROTATIONS) <= set(default_manager().symmetries)


@pytest.mark.slow
def test_a_planted_copy_of_a_llama_of_the_library_is_found() -> None:
    pytest.importorskip("transformers")
    sample = library_sample("llama")
    (inputs,) = sample.inputs()
    model = seeded(sample.make, 1)
    copy = planted_copy(model, sample.make, inputs)
    result = fuse([model, copy], solver=SOLVER, example_inputs=inputs)
    # Its norms compute in single precision. The stream, and of two layers values and planes.
    assert apart(model, result.model(), inputs) < 1e-5
    assert len(result.alignment.rotations) == 5
