"""Normal forms: they keep the function, twice is once, and what they promise of a state holds."""

from __future__ import annotations

import pytest
import torch
from nets import Cnn
from normal_nets import IMAGES, WIDTH, Vit, change, found, random_state
from normal_spellings import CASES
from torch import Tensor, nn

from mergekit_ot import trace_model
from mergekit_ot.graph.normal_form import find
from mergekit_ot.graph.normal_form.find import find_normal_form
from mergekit_ot.graph.normal_form.form import NormalForm
from mergekit_ot.graph.normal_form.rewrites import Centre, Fold, MoveBias

TOLERANCE = 1e-10


@pytest.mark.parametrize("case", CASES)
def test_the_function_is_kept_and_twice_is_once(case):
    make, inputs, _, _ = CASES[case]
    form = found(make, inputs)
    for seed in (5, 6):
        state = random_state(make, seed)
        new = form.of_state(state)
        assert change(make, state, new, inputs) <= TOLERANCE
        again = form.of_state(new)
        assert all(torch.allclose(again[name], new[name], rtol=0, atol=1e-12) for name in new)


@pytest.mark.parametrize("case", CASES)
def test_rewrites_are_those_counted_by_hand(case):
    make, inputs, (folds, moves, centres), is_centred = CASES[case]
    form = found(make, inputs)
    kinds = [type(rewrite) for rewrite in form.rewrites]
    assert (kinds.count(Fold), kinds.count(MoveBias), kinds.count(Centre)) == (folds, moves, centres)
    assert bool(form.centred) == is_centred


@pytest.mark.parametrize("case", CASES)
def test_the_state_fits_and_what_is_not_named_stays(case):
    make, inputs, _, _ = CASES[case]
    form = found(make, inputs)
    state = make().state_dict()
    new = form.of_state(state)
    assert list(new) == list(state)
    written = frozenset[str]().union(*(rewrite.names for rewrite in form.rewrites))
    assert written <= set(state)
    for name, value in state.items():
        assert (new[name].shape, new[name].dtype) == (value.shape, value.dtype)
        assert name in written or new[name] is value
    aliases = trace_model(make(), inputs).aliases
    assert all(torch.equal(new[further], new[name]) for further, name in aliases.items())


@pytest.mark.parametrize("case", CASES)
def test_neutral_names_do_nothing_and_centred_streams_have_mean_zero(case):
    make, inputs, _, _ = CASES[case]
    form, graph = found(make, inputs), trace_model(make(), inputs)
    new = form.of_state(random_state(make))
    named = [name for names in form.neutral.values() for name in names]
    assert len(named) == len(set(named)) > 0
    offsets = {rewrite.gain: 1 - rewrite.offset for rewrite in form.rewrites if isinstance(rewrite, Fold)}
    for name in named:
        # The bias of a norm that a map without bias reads is all ones.
        allowed = [offsets[name]] if name in offsets else [0.0, 1.0]
        assert any(bool((new[name] == value).all()) for value in allowed), name
    for key in form.centred:
        for slot in graph.groups[key].members:
            if slot.parameter not in named and slot.parameter not in _with_constant(form):
                assert float(new[slot.parameter].mean(slot.axis).abs().max()) < 1e-12


def _with_constant(form: NormalForm) -> set[str]:
    """Returns the weights that hold, along the all-ones vector, what the bias of a norm gave a map without bias."""
    constant = [rewrite for rewrite in form.rewrites if isinstance(rewrite, Fold) and rewrite.is_constant]
    return {reader.weight.name for rewrite in constant for reader in rewrite.readers if reader.bias is None}


@pytest.mark.parametrize("case", ["gpt, tied", "vit", "one plus the gain"])
def test_tensors_are_read_one_at_a_time(case):
    make, inputs, _, _ = CASES[case]
    form, state = found(make, inputs), random_state(make)
    whole = form.of_state(state)
    for name in state:
        asked: list[str] = []

        def read(other: str, asked: list[str] = asked) -> Tensor:
            asked.append(other)
            return state[other]

        assert torch.equal(form.tensor(name, read), whole[name])
        assert len(set(asked)) <= 8 < len(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    form, state = found(Vit, IMAGES), random_state(Vit)
    half = {name: value.to(dtype) for name, value in state.items()}
    precise = form.of_state({name: value.double() for name, value in half.items()})
    assert all(torch.equal(value, precise[name].to(dtype)) for name, value in form.of_state(half).items())


def test_a_part_of_a_rewrite_changes_the_function():
    # Otherwise the law above could not fail.
    form, state = found(Vit, IMAGES), random_state(Vit)
    new = form.of_state(state)
    for rewrite in form.rewrites:
        if isinstance(rewrite, Fold):
            gain_only = {**state, rewrite.gain: new[rewrite.gain]}
            assert change(Vit, state, gain_only, IMAGES) > 1e-6
        if isinstance(rewrite, MoveBias) and rewrite.readers:
            bias_only = {**state, rewrite.bias: torch.zeros_like(state[rewrite.bias])}
            assert change(Vit, state, bias_only, IMAGES) > 1e-6


def test_what_the_data_flow_wrongly_suggests_is_refused_by_the_proof(monkeypatch):
    lies = [MoveBias((), "block.attention.q.bias", (0, 3)), Fold((), "block.n1.weight", None, ())]
    guess = find.guess_moves

    def lying(view):
        moves, refusals = guess(view)
        return [lies[0], *moves, lies[1]], refusals

    honest = found(Vit, IMAGES)
    monkeypatch.setattr(find, "guess_moves", lying)
    form = found(Vit, IMAGES)
    assert not set(lies[:1]) & set(form.rewrites)
    assert "block.attention.q.bias" in {refusal.parameter for refusal in form.refusals}
    assert set(honest.rewrites) <= set(form.rewrites)
    assert form.centred == honest.centred


def test_a_fold_that_fails_leaves_its_readers_uncentred(monkeypatch):
    # What reads a norm may be centred only once its gain is folded.
    guess = find.guess_folds

    def lying(view, norms):
        guesses, refusals = guess(view, norms)
        broken = guesses[0].fold.__class__((), guesses[0].fold.gain, guesses[0].fold.bias, ())
        return [guesses[0].__class__(broken, guesses[0].norms, guesses[0].maps), *guesses[1:]], refusals

    monkeypatch.setattr(find, "guess_folds", lying)
    form, state = found(Vit, IMAGES), random_state(Vit)
    assert "block.n1.weight" in {refusal.parameter for refusal in form.refusals}
    assert any(isinstance(rewrite, Centre) for rewrite in form.rewrites)
    assert change(Vit, state, form.of_state(state), IMAGES) <= TOLERANCE


def test_few_runs_are_made():
    graph, made = trace_model(Vit(), *IMAGES), []

    def make() -> nn.Module:
        made.append(1)
        return Vit()

    find_normal_form(graph, make, IMAGES)
    # Five by the proof, four to find another shape that the model takes, two of the rewritten state.
    assert 0 < len(made) <= 11


def test_a_network_without_norms_is_not_run():
    def make() -> nn.Module:
        raise AssertionError("it was run")

    inputs = (torch.randn(2, 1, 8, 8),)
    form = find_normal_form(trace_model(Cnn(), inputs), make, inputs)
    assert (form.rewrites, form.refusals, dict(form.neutral), form.centred) == ((), (), {}, frozenset())


def test_a_model_that_cannot_be_run_proves_nothing():
    def make() -> nn.Module:
        raise RuntimeError("no weights here")

    form = find_normal_form(trace_model(Vit(), *IMAGES), make, IMAGES)
    assert form.rewrites == ()
    assert not form.centred
    assert not form.neutral
    assert all("no weights here" in refusal.reason for refusal in form.refusals)
    assert "block.n1.weight" in {refusal.parameter for refusal in form.refusals}


class Windows(nn.Module):
    """Rows of four tokens behind a norm, the last one filled up with zeros where tokens are missing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.embed(x))
        missing = -x.shape[1] % 4
        if missing:
            y = nn.functional.pad(y, (0, 0, 0, missing))
        return self.head(y.unflatten(1, (-1, 4))).flatten(1, 2)


def test_what_holds_at_the_traced_shape_only_is_refused():
    inputs = (torch.randn(2, 8, WIDTH),)
    form = found(Windows, inputs)
    assert not any(isinstance(rewrite, Fold) for rewrite in form.rewrites)
    assert "norm.weight" in {refusal.parameter for refusal in form.refusals}
