"""Laws of what predicts tokens from the states of recurrent layers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergeot_repair.programs.maps import free_maps
from mergeot_repair.refit.recurrent_results import fit_tokens, fitted_to_tokens, token_maps
from mergeot_repair.refit.refit import RefitRepair
from mergeot_repair.refit.results import Classifier
from signed import traced_once
from torch import Tensor, nn

from mergekit_ot import Aim, RepairContext, fuse

pytestmark = pytest.mark.usefixtures(traced_once.__name__)


class _Language(nn.Module):
    """A GRU that predicts a token for each; its logits reach far, as those of trained networks do."""

    def __init__(self, seed: int, is_recurrent: bool = True, steps: slice = slice(None)) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder, self.decoder, self.steps = nn.Embedding(12, 8), nn.Linear(8, 12), steps
        self.hidden = nn.GRU(8, 8, batch_first=True) if is_recurrent else nn.Linear(8, 8)
        with torch.no_grad():
            self.decoder.weight.mul_(20)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns logits of the next token."""
        made = self.hidden(self.encoder(tokens))
        states = made[0] if isinstance(made, tuple) else torch.tanh(made)
        return self.decoder(states[:, self.steps])


def _tokens(count: int, seed: int) -> Tensor:
    return torch.randint(12, (count, 15), generator=torch.Generator().manual_seed(seed))


def _context(nets: list[nn.Module], data: Tensor) -> RepairContext:
    batches = [(part,) for part in data.split(50)]
    result = fuse(nets, solver="average", example_inputs=batches[0], device="cpu")
    return result.repair_context(result.state, (0.5, 0.5), batches)


def _divergence(nets: list[nn.Module], model: nn.Module, data: Tensor) -> float:
    with torch.no_grad():
        goal = torch.stack([net(data).double().softmax(-1) for net in nets]).mean(0)
        missed = goal * (goal.log() - model(data).double().log_softmax(-1))
    return float(missed.sum(-1).mean())


@pytest.mark.slow
def test_a_refit_to_probabilities_is_nearer_than_one_to_outputs() -> None:
    nets: list[nn.Module] = [_Language(seed).eval() for seed in (0, 1)]
    context = _context(nets, _tokens(400, 2))
    repairs = RefitRepair(neurons="mixed"), RefitRepair(target="outputs", neurons="mixed")
    assert [repair.aim(context) for repair in repairs] == [Aim.PROBABILITIES, Aim.OUTPUTS]
    found = [repair.repair(replace(context, aim=repair.aim(context))) for repair in repairs]
    distances = [_divergence(nets, context.instance(state), _tokens(200, 3)) for state in found]
    assert distances[0] < 0.8 * distances[1]
    # All but the map that predicts is the same.
    assert {name for name in found[0] if not torch.equal(found[0][name], found[1][name])} == {
        "decoder.weight",
        "decoder.bias",
    }


def test_a_fit_that_has_the_ensemble_already_changes_nothing() -> None:
    net = _Language(0).eval()
    context = _context([net, net], _tokens(100, 2))
    state = {name: value.clone() for name, value in context.fused.items()}
    (linear_map,) = token_maps(context, free_maps(context))
    fit_tokens(context, linear_map, state)
    assert _divergence([net], context.instance(state), _tokens(50, 3)) < 1e-6


@pytest.mark.parametrize(
    ("options", "count"),
    [({}, 1), ({"is_recurrent": False}, 0), ({"steps": slice(-3, None)}, 0)],
    ids=["each token", "no recurrent layer", "some steps only"],
)
def test_which_maps_predict_tokens(options: dict[str, object], count: int) -> None:
    context = _context([_Language(seed, **options).eval() for seed in (0, 1)], _tokens(100, 2))  # type: ignore[arg-type]
    assert len(token_maps(context, free_maps(context))) == count


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), has_shift=st.booleans())
def test_no_small_change_of_a_fit_is_better(seed: int, has_shift: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    read, goals = (torch.randn(400, size, generator=generator) for size in (5, 4))
    goals = (2 * goals).softmax(1)
    start = Classifier(torch.randn(4, 5, generator=generator), torch.zeros(4) if has_shift else None)
    found = fitted_to_tokens(start, read, goals)
    assert (found.shift is None) is (start.shift is None)

    def missed(classifier: Classifier) -> float:
        return -float((goals * classifier.logits(read).log_softmax(1)).sum(1).mean())

    moved = Classifier(found.weight + 0.1 * torch.randn(4, 5, generator=generator), found.shift)
    assert missed(found) < missed(start)
    assert missed(found) < missed(moved)


@pytest.mark.slow
def test_of_all_neurons_and_one_sources_those_that_are_nearer_are_taken() -> None:
    nets: list[nn.Module] = [_Language(seed).eval() for seed in (0, 1)]
    context = _context(nets, _tokens(500, 2))
    context = replace(context, aim=Aim.PROBABILITIES)
    far = {
        neurons: _divergence(nets, context.instance(RefitRepair(neurons=neurons).repair(context)), _tokens(200, 3))
        for neurons in ("mixed", "single", "auto")
    }
    assert far["auto"] <= 1.05 * min(far["mixed"], far["single"])
