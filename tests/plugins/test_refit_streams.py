"""Laws of the refit of residual streams behind norms, on small transformers with random weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import pytest
import torch
from mergeot_repair.programs.maps import MapFinder
from mergeot_repair.refit.one_pass import RefitPass
from mergeot_repair.refit.refit import RefitRepair
from mergeot_repair.streams.finding import Stream, StreamFinder
from mergeot_repair.streams.proof import random_turn
from torch import Tensor, nn
from torch.nn import functional

from mergekit_ot import RepairContext, fuse, trace_model

_VOCABULARY, _LENGTH = 11, 6


class _Attention(nn.Module):
    """Self-attention, or attention to another stream: several queries may share a key, and all three one weight."""

    def __init__(self, width: int, heads: int, options: dict) -> None:
        super().__init__()
        self.heads, self.size = heads, 4
        self.key_heads = options.get("key_heads", heads)
        self.is_packed, bias = options.get("is_packed", False), options.get("bias", True)
        if self.is_packed:
            self.qkv = nn.Linear(width, 3 * heads * self.size, bias=False)
        else:
            self.q = nn.Linear(width, heads * self.size, bias=bias)
            self.k, self.v = (nn.Linear(width, self.key_heads * self.size, bias=bias) for _ in range(2))
        self.o = nn.Linear(heads * self.size, width, bias=bias)
        self.relative = nn.Parameter(torch.randn(heads, _LENGTH, _LENGTH)) if options.get("relative") else None

    def forward(self, read: Tensor, other: Tensor | None = None) -> Tensor:
        other = read if other is None else other
        maps = self.qkv(read).chunk(3, -1) if self.is_packed else (self.q(read), self.k(other), self.v(other))
        query, key, value = (made.unflatten(-1, (-1, self.size)).transpose(1, 2) for made in maps)
        repeats = self.heads // self.key_heads
        key, value = (part.repeat_interleave(repeats, 1) if repeats > 1 else part for part in (key, value))
        scores = query @ key.mT / self.size**0.5
        if self.relative is not None:
            scores = scores + self.relative
        return self.o((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, options: dict) -> None:
        super().__init__()
        bias, self.is_gated = options.get("bias", True), options.get("is_gated", False)
        # One norm may be called in several places.
        norms = [_norm(width, options) for _ in range(1 if options.get("shares") else 3)]
        self.norms = nn.ModuleList((3 * norms)[:3])
        self.attention = _Attention(width, heads, options)
        self.cross = _Attention(width, heads, options) if options.get("crosses") else None
        self.up, self.down = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)
        self.gate = nn.Linear(width, hidden, bias=bias) if self.is_gated else None

    def forward(self, stream: Tensor, other: Tensor | None = None) -> Tensor:
        stream = stream + self.attention(self.norms[0](stream))
        if self.cross is not None and other is not None:
            stream = stream + self.cross(self.norms[2](stream), other)
        read = self.norms[1](stream)
        hidden = functional.gelu(self.up(read))
        return stream + self.down(hidden if self.gate is None else hidden * self.gate(read))


class _SpelledNorm(nn.Module):
    """RMSNorm in single operations, whose gain is stored as its distance from one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, stream: Tensor) -> Tensor:
        return stream * torch.rsqrt(stream.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


def _norm(width: int, options: dict) -> nn.Module:
    kinds = {"layer": nn.LayerNorm, "rms": lambda size: nn.RMSNorm(size, eps=1e-6), "spelled": _SpelledNorm}
    return kinds[options.get("norm", "layer")](width)


class _Net(nn.Module):
    """A small transformer over six tokens."""

    def __init__(self, width: int = 16, heads: int = 4, hidden: int = 24, layers: int = 2, **options: object) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_VOCABULARY, width)
        self.positions = nn.Parameter(0.5 * torch.randn(_LENGTH, width))
        self.blocks = nn.ModuleList(_Block(width, heads, hidden, options) for _ in range(layers))
        self.norm = _norm(width, options)
        self.head = nn.Linear(width, _VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1.5 / module.in_features**0.5)
            elif isinstance(module, nn.LayerNorm | nn.RMSNorm | _SpelledNorm):
                for parameter in module.parameters():
                    nn.init.normal_(parameter, float(parameter.detach().mean()), 0.2)
        if options.get("is_tied"):
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.embedding(tokens) + self.positions
        for block in self.blocks:
            stream = block(stream)
        return self.head(self.norm(stream))


class _TwoStreams(nn.Module):
    """An encoder, and a decoder that attends to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Embedding(_VOCABULARY, width) for width in (12, 16))
        self.encoder, self.decoder = _Block(12, 4, 20, {}), _Block(16, 4, 20, {"crosses": True})
        self.decoder.cross.k, self.decoder.cross.v = nn.Linear(12, 16), nn.Linear(12, 16)
        self.between, self.norm, self.head = nn.LayerNorm(12), nn.LayerNorm(16), nn.Linear(16, _VOCABULARY)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1.5 / module.in_features**0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        other = self.between(self.encoder(self.first(tokens)))
        return self.head(self.norm(self.decoder(self.second(tokens.flip(1)), other)))


_KINDS = {
    "LayerNorm": {},
    "RMSNorm, no biases": {"norm": "rms", "bias": False},
    "spelled out, gated": {"norm": "spelled", "is_gated": True},
    "tied": {"is_tied": True},
    "tied, RMSNorm": {"is_tied": True, "norm": "rms"},
    "packed, relative positions": {"is_packed": True, "relative": True},
    "grouped queries": {"key_heads": 2},
    "one norm in several places": {"shares": True},
    "one RMSNorm in several places": {"shares": True, "norm": "rms"},
}
_ALL_KINDS = pytest.mark.parametrize("options", list(_KINDS.values()), ids=list(_KINDS))


def _net(seed: int, **options: object) -> _Net:
    torch.manual_seed(seed)
    return _Net(**options).eval()


def _tokens(count: int, seed: int) -> Tensor:
    return torch.randint(0, _VOCABULARY, (count, _LENGTH), generator=torch.Generator().manual_seed(seed))


def _context(nets: Sequence[nn.Module], **options: object) -> RepairContext:
    tokens = _tokens(600, 3)
    result = fuse(list(nets), solver="average", example_inputs=tokens[:50], device="cpu", **options)
    weights = tuple(1 / len(nets) for _ in nets)
    return result.repair_context(result.state, weights, [(batch,) for batch in tokens.split(50)])


def _repaired(context: RepairContext) -> nn.Module:
    return context.instance(RefitRepair().repair(context))


def _streams(context: RepairContext) -> list[Stream]:
    return StreamFinder(context, MapFinder(context.program).find()).find()


def _distance(one: nn.Module, other: nn.Module | Callable[[Tensor], Tensor]) -> float:
    """The mean square of a difference of outputs, as a share of the variance of the second's."""
    tokens = _tokens(200, 9)
    with torch.no_grad():
        wanted = other(tokens)
        return float((one(tokens) - wanted).square().mean() / wanted.var())


@_ALL_KINDS
def test_a_network_fused_with_itself_stays(options: dict) -> None:
    net = _net(0, **options)
    context = _context([net, net])
    assert len(_streams(context)) == 1
    assert _distance(_repaired(context), net) < 1e-5


@_ALL_KINDS
def test_a_source_with_all_the_weight_stays(options: dict) -> None:
    nets = [_net(seed, **options) for seed in (0, 1)]
    context = dataclasses.replace(_context(nets), model_weights=(0.0, 1.0))
    assert _distance(_repaired(context), nets[1]) < 1e-6


@_ALL_KINDS
def test_it_is_nearer_to_the_mean_of_the_sources_than_they_are(options: dict) -> None:
    nets = [_net(seed, **options) for seed in (0, 1)]

    def mean(tokens: Tensor) -> Tensor:
        return (nets[0](tokens) + nets[1](tokens)) / 2

    fused = _distance(_repaired(_context(nets)), mean)
    assert fused < 0.6 * min(_distance(net, mean) for net in nets)


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [(0, 1), (2, 3)])
@pytest.mark.parametrize("options", [{}, {"norm": "rms"}, {"norm": "rms", "key_heads": 2}, {"key_heads": 2}])
def test_the_order_of_the_sources_does_not_matter(options: dict, seeds: tuple[int, int]) -> None:
    nets = [_net(seed, **options) for seed in seeds]
    assert _distance(_repaired(_context(nets)), _repaired(_context(nets[::-1]))) < 1e-6


def test_three_sources_are_fused() -> None:
    nets = [_net(seed) for seed in (0, 1, 2)]

    def mean(tokens: Tensor) -> Tensor:
        return torch.stack([net(tokens) for net in nets]).mean(0)

    assert _distance(_repaired(_context(nets)), mean) < 0.8 * min(_distance(net, mean) for net in nets)


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_tied_embedding_stays_tied(norm: str) -> None:
    context = _context([_net(seed, is_tied=True, norm=norm) for seed in (0, 1)])
    state = RefitRepair().repair(context)
    assert torch.equal(state["embedding.weight"], state["head.weight"])
    assert not torch.equal(state["embedding.weight"], context.fused["embedding.weight"])


def test_two_equal_neurons_do_not_go_together() -> None:
    net = _net(0)
    with torch.no_grad():
        for block in net.blocks:
            block.up.weight[1], block.up.bias[1] = block.up.weight[0], block.up.bias[0]
    assert _distance(_repaired(_context([net, net])), net) < 1e-5


def _planted(net: _Net, fixes_ones: bool) -> nn.Module:
    """A copy that computes the same: another basis of the stream, another order of heads and neurons."""
    generator = torch.Generator().manual_seed(5)
    turn = random_turn(16, fixes_ones, generator).float()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    for name in state:
        if name.endswith((".q.weight", ".k.weight", ".v.weight", ".up.weight", "head.weight", "embedding.weight")):
            state[name] = state[name] @ turn.T
        elif name.endswith((".o.weight", ".down.weight", ".o.bias", ".down.bias")):
            state[name] = turn @ state[name]
        elif name == "positions":
            state[name] = state[name] @ turn.T
        elif "norm" in name:
            state[name] = torch.full_like(state[name], float(name.endswith("weight")))
    heads, neurons = (torch.randperm(size, generator=generator) for size in (4, 24))
    rows = (heads[:, None] * 4 + torch.arange(4)).flatten()
    for number in range(len(net.blocks)):
        for part in ("q", "k", "v"):
            for kind in ("weight", "bias"):
                name = f"blocks.{number}.attention.{part}.{kind}"
                state[name] = state[name][rows]
        for name, order in (("attention.o", rows), ("down", neurons)):
            state[f"blocks.{number}.{name}.weight"] = state[f"blocks.{number}.{name}.weight"][:, order]
        for kind in ("weight", "bias"):
            state[f"blocks.{number}.up.{kind}"] = state[f"blocks.{number}.up.{kind}"][neurons]
    copy = _net(7, norm="layer" if fixes_ones else "rms")
    copy.load_state_dict(state)
    return copy


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_a_turned_copy_is_the_same_network(norm: str) -> None:
    net = _net(0, norm=norm)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "norm" in name:
                parameter.fill_(float(name.endswith("weight")))
    copy = _planted(net, fixes_ones=norm == "layer")
    assert _distance(copy, net) < 1e-8
    assert _distance(_repaired(_context([net, copy])), net) < 1e-4


def test_with_room_for_all_heads_and_neurons_it_comes_nearer() -> None:
    nets = [_net(seed) for seed in (0, 1)]

    def mean(tokens: Tensor) -> Tensor:
        return (nets[0](tokens) + nets[1](tokens)) / 2

    torch.manual_seed(2)
    large = _Net(heads=8, hidden=48).eval()
    context = _context(nets)
    graph = trace_model(large, _tokens(50, 3))
    # Solvers do not couple heads of other numbers; what is chosen and fitted asks none of them.
    alignment = dataclasses.replace(context.sources[0].alignment, target=graph)
    wide = dataclasses.replace(
        context,
        instance=lambda state: _loaded(_Net(heads=8, hidden=48), state),
        fused=large.state_dict(),
        program=graph.program,
        sources=tuple(dataclasses.replace(source, alignment=alignment) for source in context.sources),
    )
    streams = _streams(wide)
    fitted = RefitPass(wide, streams).run()
    assert _distance(wide.instance(fitted), mean) < 0.9 * _distance(_repaired(context), mean)


def _loaded(net: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    net.load_state_dict(dict(state))
    return net.eval()


def test_attention_to_another_stream_is_chosen_too() -> None:
    nets = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        nets.append(_TwoStreams().eval())
    context = _context([nets[0], nets[0]])
    assert len(_streams(context)) == 2
    assert _distance(_repaired(context), nets[0]) < 1e-5

    def mean(tokens: Tensor) -> Tensor:
        return (nets[0](tokens) + nets[1](tokens)) / 2

    assert _distance(_repaired(_context(nets)), mean) < 0.6 * min(_distance(net, mean) for net in nets)


class _Other(nn.Module):
    """A network with a norm over neurons that are no stream of this kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.embedding, self.norm = nn.Embedding(_VOCABULARY, 8), nn.LayerNorm(8)
        self.up, self.down, self.head = nn.Linear(8, 12), nn.Linear(12, 8), nn.Linear(8, 3)
        self.wide, self.scale = nn.Linear(16, 3), nn.Parameter(torch.rand(8))

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.embedding(tokens)
        branch = self.down(self.up(self.norm(stream)).relu())
        if self.kind == "scaled as it is written":
            return self.head(self.norm(stream + self.scale * branch))
        if self.kind == "gain read elsewhere":
            return self.head(self.norm(stream + branch).relu())
        if self.kind == "read without a norm":
            return self.head((stream + branch).relu())
        if self.kind == "norm is a stream":
            return self.head(self.norm(self.norm(stream) + branch))
        return self.wide(torch.cat([self.norm(stream + branch), stream + branch], -1))


@pytest.mark.parametrize(
    "kind",
    [
        "gain read elsewhere",
        "read without a norm",
        "norm is a stream",
        "scaled as it is written",
        "joined with another",
    ],
)
def test_other_streams_are_left_as_they_are(kind: str) -> None:
    torch.manual_seed(0)
    assert not _streams(_context([_Other(kind).eval(), _Other(kind).eval()]))
