"""Refit of linear layers whose weight has the inputs on its first axis, as those of GPT-2."""

from __future__ import annotations

import pytest
import torch
from mergeot_repair.programs.maps import MapFinder
from mergeot_repair.refit.refit import RefitRepair
from mergeot_repair.refit.samples import rows_of, weight_of
from mergeot_repair.streams.finding import StreamFinder
from torch import Tensor, nn
from torch.nn import functional

from mergekit_ot import RepairContext, fuse

_VOCABULARY, _LENGTH = 11, 6


class _Turned(nn.Module):
    """``inputs @ weight + bias`` in one operation on rows."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1.5 / inputs**0.5 * torch.randn(inputs, outputs))
        self.bias = nn.Parameter(0.2 * torch.randn(outputs))

    def forward(self, values: Tensor) -> Tensor:
        made = torch.addmm(self.bias, values.view(-1, values.size(-1)), self.weight)
        return made.view(*values.shape[:-1], -1)


class _Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = _Turned(6, 24), nn.Linear(24, 16), _Turned(16, 4)

    def forward(self, values: Tensor) -> Tensor:
        return self.third(self.second(self.first(values).relu()).relu())


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.qkv, self.o, self.up, self.down = _Turned(16, 48), _Turned(16, 16), _Turned(16, 24), _Turned(24, 16)

    def forward(self, stream: Tensor) -> Tensor:
        maps = self.qkv(self.norms[0](stream)).split(16, -1)
        query, key, value = (made.unflatten(-1, (4, 4)).transpose(1, 2) for made in maps)
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        stream = stream + self.o(mixed.transpose(1, 2).flatten(2))
        return stream + self.down(functional.gelu(self.up(self.norms[1](stream))))


class _Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(_VOCABULARY, 16), nn.Parameter(0.5 * torch.randn(_LENGTH, 16))
        self.blocks, self.norm = nn.ModuleList(_Block() for _ in range(2)), nn.LayerNorm(16)
        self.head = nn.Linear(16, _VOCABULARY, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.embedding(tokens) + self.positions
        for block in self.blocks:
            stream = block(stream)
        return self.head(self.norm(stream))


def _nets(kind: type[nn.Module], seeds: tuple[int, ...] = (0, 1)) -> list[nn.Module]:
    nets = []
    for seed in seeds:
        torch.manual_seed(seed)
        nets.append(kind().eval())
    return nets


def _data(kind: type[nn.Module], count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if kind is _Perceptron:
        return torch.randn(count, 6, generator=generator)
    return torch.randint(0, _VOCABULARY, (count, _LENGTH), generator=generator)


def _context(kind: type[nn.Module], nets: list[nn.Module]) -> RepairContext:
    data = _data(kind, 600, 3)
    result = fuse(nets, example_inputs=data[:50], data=[data[:50]], device="cpu", solver="average")
    return result.repair_context(result.state, (0.5, 0.5), [(batch,) for batch in data.split(50)])


_BOTH = pytest.mark.parametrize("kind", [_Perceptron, _Decoder])


def _distances(kind: type[nn.Module], context: RepairContext, nets: list[nn.Module]) -> list[float]:
    """How far from the sources' mean the repaired network, the fused one, and each source are."""
    data = _data(kind, 300, 9)
    fused = context.instance(context.fused)
    repaired = context.instance(RefitRepair().repair(context))
    with torch.no_grad():
        mean = torch.stack([net(data) for net in nets]).mean(0)
        return [float((net(data) - mean).square().mean() / mean.var()) for net in (repaired, fused, *nets)]


@_BOTH
def test_they_are_linear_maps(kind: type[nn.Module]) -> None:
    nets = _nets(kind)
    context = _context(kind, nets)
    maps = MapFinder(context.program).find()
    weights = {name for name, module in nets[0].named_modules() if isinstance(module, _Turned)}
    assert {each.weight.removesuffix(".weight") for each in maps if each.is_turned} == weights
    assert all((each.output_axis, each.input_axis) == (1, 0) for each in maps if each.is_turned)
    assert len(StreamFinder(context, maps).find()) == int(kind is _Decoder)


def test_rows_of_a_turned_weight_are_its_columns() -> None:
    context = _context(_Perceptron, _nets(_Perceptron))
    turned = next(each for each in MapFinder(context.program).find() if each.is_turned)
    weight = context.fused[turned.weight]
    rows = rows_of(turned, weight)
    assert torch.equal(rows, weight.T)
    assert torch.equal(weight_of(turned, rows, weight), weight)


@_BOTH
def test_a_network_fused_with_itself_stays(kind: type[nn.Module]) -> None:
    net = _nets(kind)[0]
    assert _distances(kind, _context(kind, [net, net]), [net, net])[0] < 1e-4


@_BOTH
def test_it_comes_nearer_to_the_mean_of_the_sources(kind: type[nn.Module]) -> None:
    nets = _nets(kind)
    repaired, fused, *sources = _distances(kind, _context(kind, nets), nets)
    assert repaired < 0.7 * fused
    assert repaired < 0.8 * min(sources)
