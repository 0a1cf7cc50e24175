"""Planted duplicates: every hidden neuron several times, its outgoing weights shared out; widths fuse back exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from unittest.mock import patch

import pytest
import torch
from nets import BasicBlock, Cnn, Mlp, ResidualMlp
from signed import traced_once
from torch import Tensor, nn

from mergekit_ot import Coupling, FusionResult, ModelGraph, api, fuse, trace_model
from mergekit_ot.graph.blocks import blocks_of
from mergekit_ot.graph.layouts import IN
from mergekit_ot.graph.symmetry.permutation import random_orders, reorder_state

pytestmark = pytest.mark.usefixtures(traced_once.__name__)


class Recurrent(nn.Module):
    """A recurrent module, and a linear layer on its last output."""

    def __init__(self, kind: type[nn.RNNBase], width: int, **options: object) -> None:
        super().__init__()
        self.recurrent = kind(3, width, batch_first=True, **options)
        self.head = nn.Linear(2 * width if self.recurrent.bidirectional else width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0][:, -1])


class Words(nn.Module):
    """An embedding that a linear layer reads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.head = nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


class Encoder(nn.Module):
    """Torch's transformer encoder, whose hidden layer has the width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(6, 2, width, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Residual(nn.Module):
    """A stem, a residual block on its stream, and one that doubles the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, width, 3, padding=1)
        self.block1, self.block2 = BasicBlock(width, width, 1, "B"), BasicBlock(width, 2 * width, 2, "B")
        self.head = nn.Linear(2 * width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block2(self.block1(torch.relu(self.stem(x)))).mean((2, 3)))


class Values(nn.Module):
    """Self-attention whose values, unlike its queries and keys, have the width in each head."""

    def __init__(self, width: int, heads: int = 3, keys: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key = nn.Linear(6, heads * keys), nn.Linear(6, heads * keys)
        self.value, self.out = nn.Linear(6, heads * width), nn.Linear(heads * width, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        return self.out(((q @ k.mT / 2).softmax(-1) @ v).transpose(1, 2).flatten(2))


class Groups(nn.Module):
    """A grouped convolution behind GroupNorm; three groups of channels, of the width each."""

    def __init__(self, width: int, groups: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, width * groups, 3)
        self.norm = nn.GroupNorm(groups, width * groups)
        self.conv2 = nn.Conv2d(width * groups, (width + 1) // 2 * groups, 3, groups=groups)
        self.head = nn.Linear((width + 1) // 2 * groups, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.conv2(torch.tanh(self.norm(self.conv1(x))))).mean((2, 3)))


class Depthwise(nn.Module):
    """A depthwise convolution between two pointwise ones."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(2, width, 1)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.project = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.relu(self.depthwise(torch.relu(self.expand(x))))).mean((2, 3))


@dataclass(frozen=True)
class Case:
    """A network by width, and inputs for it."""

    make: Callable[[int], nn.Module]
    inputs: Tensor
    width: int = 5


def _numbers(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


SEQUENCES, IMAGES = _numbers(3, 5, 3), _numbers(3, 2, 8, 8)
CASES: dict[str, Case] = {
    "linear with bias": Case(lambda w: Mlp((9, 2 * w, w, 3)), _numbers(4, 9)),
    "convolution, BatchNorm, flatten": Case(lambda w: Cnn(w, w + w, w), _numbers(3, 1, 8, 8)),
    "residual blocks": Case(Residual, IMAGES, 4),
    "residual stream with LayerNorm": Case(lambda w: ResidualMlp(w), _numbers(3, 4)),
    "grouped convolution": Case(Groups, IMAGES, 4),
    "depthwise convolution": Case(Depthwise, IMAGES),
    "rnn": Case(lambda w: Recurrent(nn.RNN, w), SEQUENCES),
    "lstm": Case(lambda w: Recurrent(nn.LSTM, w), SEQUENCES),
    "gru": Case(lambda w: Recurrent(nn.GRU, w), SEQUENCES),
    "lstm of two layers": Case(lambda w: Recurrent(nn.LSTM, w, num_layers=2), SEQUENCES),
    "bidirectional gru": Case(lambda w: Recurrent(nn.GRU, w, bidirectional=True), SEQUENCES),
    "embedding": Case(Words, torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(0))),
    "transformer encoder": Case(Encoder, _numbers(3, 5, 6)),
    "values of attention": Case(Values, _numbers(3, 5, 6)),
}
RECURRENT = ("rnn", "lstm", "gru")


def far_from_initial(model: nn.Module, seed: int) -> nn.Module:
    """The model in double precision, with gains, shifts and statistics that are not ones and zeros."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.double().eval().state_dict().items():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
                if not name.endswith("running_var"):
                    tensor.mul_(torch.randn(tensor.shape, generator=generator).sign())
    return model


def alike_but_for_states(model: nn.Module, width: int) -> nn.Module:
    """The recurrent model with neurons that differ in nothing but how they read, and are read by, each other."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "weight_ih" in name or "bias_" in name:
                gates = tensor.unflatten(0, (-1, width))
                gates.copy_(gates[:, :1].clone().expand_as(gates))
        model.head.weight.copy_(model.head.weight[:, :1].clone().expand_as(model.head.weight))
    return model


def grown(state: dict[str, Tensor], graph: ModelGraph, large: nn.Module, large_graph: ModelGraph) -> dict[str, Tensor]:
    """The state of the large model: owners of neurons repeated, what reads them repeated and shared out."""
    result = {name: tensor.clone() for name, tensor in large.state_dict().items()}
    for name, tensor in state.items():
        if name not in graph.layouts:
            result[name] = tensor.clone()
            continue
        old, new = blocks_of(tensor, graph.layouts[name]), blocks_of(result[name], large_graph.layouts[name])
        for one, many in zip(old, new, strict=True):
            view = one.view
            for place, (ours, theirs) in enumerate(zip(one.dimensions, many.dimensions, strict=True)):
                copies = theirs.size // ours.size
                view = view.repeat_interleave(copies, place)
                if ours.group is not None and graph.roles[name, ours.axis, ours.group] == IN:
                    view = view / copies
            many.view.copy_(view)
    return result


@cache
def planted(name: str, copies: int = 2, is_alike: bool = False) -> dict[nn.Module, ModelGraph]:
    """A model, and one of the same function in which every neuron stands several times, in random order."""
    case = CASES[name]
    torch.manual_seed(0)
    small, large = far_from_initial(case.make(case.width), 0), case.make(copies * case.width).double().eval()
    if is_alike:
        small = alike_but_for_states(small, case.width)
    graph, large_graph = (trace_model(model, case.inputs) for model in (small, large))
    state = grown(small.state_dict(), graph, large, large_graph)
    orders = random_orders(large_graph, torch.Generator().manual_seed(0))
    large.load_state_dict(reorder_state(state, large_graph, orders))
    sizes = {key: (group.size, large_graph.groups[key].size) for key, group in graph.free_groups.items()}
    assert any(many == copies * one for one, many in sizes.values())
    assert error(large, small, case.inputs) < 1e-12
    return {small: graph, large: large_graph}


def error(one: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad():
        ours, theirs = one(inputs), other(inputs)
    return float((ours - theirs).abs().max() / theirs.abs().max())


def shapes_of(state: Mapping[str, Tensor]) -> tuple[object, ...]:
    return tuple((name, *tensor.shape) for name, tensor in state.items())


@cache
def fused(
    name: str, solver: str, target: int, is_spread: bool = False, **planting: object
) -> tuple[FusionResult, float]:
    """The narrow and the wide model fused, and by how much the function changed.

    Masses are spread over a group with room for more neurons than a source has, or else neurons are kept apart.
    """
    options = {"keep_apart": False} if is_spread else {}
    case, graphs = CASES[name], planted(name, **planting)
    models = list(graphs)
    # Tracing would take most of the time, and was done when the duplicates were planted.
    traced = {shapes_of(model.state_dict()): graph for model, graph in graphs.items()}
    with patch.object(api, "trace_model", lambda model, *_, **__: traced[shapes_of(model.state_dict())]):
        result = fuse(models, solver=solver, solver_options=options, example_inputs=case.inputs, target=target)
    assert shapes_of(result.state) == shapes_of(models[target].state_dict())
    return result, error(result.model(), models[0], case.inputs)


@pytest.mark.parametrize("target", [0, 1], ids=["narrow", "wide"])
@pytest.mark.parametrize("solver", ["wb", "gwb"])
@pytest.mark.parametrize("name", CASES)
def test_duplicates_fuse_back_to_the_same_function(name: str, solver: str, target: int) -> None:
    assert fused(name, solver, target)[1] < 1e-9


@pytest.mark.parametrize("name", CASES)
def test_masses_spread_over_the_wide_group_share_every_neuron_out(name: str) -> None:
    result, change = fused(name, "wb", 1, is_spread=True)
    assert change < 1e-9
    for couplings in result.alignment.couplings.values():
        marginals = [each.target_marginal() for each in couplings if isinstance(each, Coupling)]
        assert all(torch.allclose(marginal, marginal.mean()) for marginal in marginals)


@pytest.mark.parametrize("solver", ["wb", "gwb"])
@pytest.mark.parametrize("name", CASES)
def test_duplicates_cost_nothing(name: str, solver: str) -> None:
    reports = fused(name, solver, 0)[0].groups
    assert max(abs(report.cost) for report in reports) < 1e-9


@pytest.mark.parametrize("target", [0, 1], ids=["narrow", "wide"])
@pytest.mark.parametrize("name", RECURRENT)
def test_states_alone_tell_duplicates_apart(name: str, target: int) -> None:
    result, change = fused(name, "gwb", target, is_spread=True, copies=3, is_alike=True)
    assert change < 1e-9
    assert abs(result.groups[0].cost) < 1e-12


@pytest.mark.parametrize("name", RECURRENT)
def test_what_neurons_read_from_below_does_not_tell_these_apart(name: str) -> None:
    """The control of the law above."""
    assert fused(name, "wb", 0, copies=3, is_alike=True)[1] > 1e-4
