"""Module rules for stacked experts: a private order per expert, known by the name of the class alone."""

from __future__ import annotations

import mergeot_frontends
import mergeot_layers
import mergeot_transformers
import pytest
import torch
from architectures import samples
from slow_ones import first_of
from torch import Tensor, nn

from mergekit_ot import EinRule, NodeRule, SourceModel, check_model, fuse, hookimpl
from mergekit_ot.hooks.manager import PluginManager


class MixtralExperts(nn.Module):
    """Three experts, a token each, gathered by number as the library does it."""

    def __init__(self, is_shared: bool = False) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 14, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 7))
        self.is_shared = is_shared

    def forward(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        up, down = self.gate_up_proj[chosen], self.down_proj[chosen]
        gate, value = torch.einsum("tkhd,td->tkh", up, tokens).chunk(2, -1)
        if self.is_shared:
            gate = gate.flip(-1)
        outputs = torch.einsum("tkdh,tkh->tkd", down, torch.nn.functional.silu(gate) * value)
        return (outputs * weights[..., None]).sum(1)


class Routed(nn.Module):
    def __init__(self, is_shared: bool = False) -> None:
        super().__init__()
        self.embed, self.router, self.head = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)
        self.experts = MixtralExperts(is_shared)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        weights, chosen = self.router(x).softmax(-1).topk(2, -1)
        return self.head(x + self.experts(x, chosen, weights))


WITH, WITHOUT = PluginManager([mergeot_layers, mergeot_transformers]), PluginManager([mergeot_layers])


def test_every_expert_has_an_order_of_its_own() -> None:
    report = check_model(Routed, torch.randn(5, 4), manager=WITH)
    # The stream, and the hidden neurons of each of three experts.
    assert (report.groups, report.families, report.certified, report.preserved) == (2, 4, 2, True)


def test_without_the_module_rule_the_experts_are_not_private() -> None:
    report = check_model(Routed, torch.randn(5, 4), manager=WITHOUT)
    assert report.culprits == ()
    assert report.families < 4


def test_a_module_that_is_not_what_its_name_says_is_found_by_the_proof() -> None:
    report = check_model(lambda: Routed(True), torch.randn(5, 4), manager=WITH)
    assert report.culprits
    assert all("experts" in culprit for culprit in report.culprits)


@pytest.mark.parametrize("name", first_of(["mixtral", "mixtral_eager"]))
def test_both_ways_to_run_the_experts_give_the_same_groups(name: str) -> None:
    pytest.importorskip("transformers")
    sample = samples("transformers_language")[name]
    report = check_model(sample.make, sample.inputs(), trials=1)
    experts = [g for key, g in report.graph.free_groups.items() if "experts" in key]
    assert [len(group.context) for group in experts] == [1, 1]


class Twice(nn.Module):
    """Calls one module with a rule twice in a row: its outputs feed its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
        self.distances = Distances()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.distances(self.distances(self.first(x))))


class Distances(nn.Module):
    """Distances to as many points as there are inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.points)


class _Plugin:
    @hookimpl
    def mergeot_node_rules(self) -> dict[str, NodeRule]:
        return {"module:Distances": EinRule("... i; c i; c -> ... c", ("input0", "points", "nothing"))}


@pytest.mark.parametrize("front_end", ["export", "make-fx"])
def test_a_module_that_is_called_twice_in_a_row_is_two_calls(front_end: str) -> None:
    manager = PluginManager([mergeot_layers, mergeot_frontends, _Plugin()])
    report = check_model(Twice, torch.randn(5, 3), manager=manager, front_end=front_end)
    # What the points make they also read, so that all three stand in one order.
    assert (report.culprits, report.groups, report.certified) == ((), 1, 1)


def test_a_decoder_that_hands_out_its_cache_is_fused_and_keeps_its_configuration() -> None:
    transformers = pytest.importorskip("transformers")
    # One configuration for all instances, as training scripts have it.
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    tokens = torch.arange(12).reshape(2, 6)

    def make() -> nn.Module:
        return transformers.LlamaForCausalLM(config)

    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        models.append(make().eval())
    sources = [SourceModel(f"model {seed}", make, model.state_dict()) for seed, model in enumerate(models)]
    result = fuse(sources, example_inputs=tokens, solver="weight-matching")
    assert result.aligned_sources_max_error < 1e-5
    assert config.use_cache is True
    assert result.model()(tokens).past_key_values is not None
