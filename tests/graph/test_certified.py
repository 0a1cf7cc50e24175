"""What counts as certified: what one draw of weights silences may speak at another, and names may be two for one."""

from __future__ import annotations

import pytest
import torch
from rotating import TOKENS, Decoder
from torch import Tensor, nn

from mergekit_ot import check_model, trace_model
from mergekit_ot.graph.normal_form.find import find_normal_form
from mergekit_ot.graph.symmetry.check import Runs, judge
from mergekit_ot.graph.symmetry.permutation import Order, order_places
from mergekit_ot.graph.symmetry.proof import Proof


class Gated(nn.Module):
    """Hidden neurons that count where a number has the right sign, and are silent elsewhere."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        self.first, self.last, self.sign = nn.Linear(3, 4), nn.Linear(4, 2), sign
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)) * torch.relu(self.sign * self.gate))


@pytest.mark.slow
def test_a_group_that_one_draw_silences_is_certified_at_the_second() -> None:
    inputs = torch.randn(2, 3)

    def certified(sign: float, seed: int) -> int:
        return check_model(lambda: Gated(sign), inputs, seed=seed).certified

    # The second draw is the same for all seeds; at one of the two signs it lets the neurons speak.
    assert any(all(certified(sign, seed) == 1 for seed in range(3)) for sign in (1.0, -1.0))


class Named(nn.Module):
    """All its weights have two names."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 4, bias=False), nn.Tanh(), nn.Linear(4, 2, bias=False))
        self.again = self.body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_neurons_of_which_every_weight_has_two_names_are_certified() -> None:
    report = check_model(Named, torch.randn(2, 3))
    assert (report.groups, report.certified, report.preserved) == (1, 1, True)


def test_an_output_that_is_no_number_any_more_is_the_largest_change() -> None:
    proof = Proof(lambda: nn.Linear(3, 2), (torch.randn(2, 3),), seed=0)
    assert proof.change(proof.state) == 0
    assert proof.change({name: value * float("nan") for name, value in proof.state.items()}) == float("inf")


def test_no_family_holds_of_a_group_that_is_refuted() -> None:
    def make() -> nn.Module:
        return nn.Sequential(nn.Conv2d(2, 6, 1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 2, 1))

    inputs = torch.randn(2, 2, 3, 3)
    graph = trace_model(make(), inputs)
    family = next(key for key, group in graph.free_groups.items() if group.context)
    (outer,) = graph.groups[family].context
    places = order_places(graph, graph.free_groups)
    # A place of the outer group is left out, so that an order of it changes the function.
    places[outer] = {place: powers for place, powers in places[outer].items() if place != ("0.weight", 0)}
    verdict = judge(Order(), graph, places, Runs([Proof(make, (inputs,), seed=0)]), trials=1)
    assert tuple(verdict.culprits) == (outer,)
    assert verdict.places == {}


def test_another_draw_is_in_the_form_of_the_first() -> None:
    make = lambda: Decoder("llama", layers=1)  # noqa: E731
    form = find_normal_form(trace_model(make(), TOKENS), make, (TOKENS,))
    runs = Runs([Proof(make, (TOKENS,), seed=0)])
    gains = [name for names in form.neutral.values() for name in names]
    assert gains
    drawn, rewritten = runs.again().state, runs.rewritten(form).again().state
    assert not any(bool((drawn[name] == 1).all()) for name in gains)
    assert all(bool((rewritten[name] == 1).all()) for name in gains)
