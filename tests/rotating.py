"""Small transformers whose streams and heads may be rotated, and copies of them with everything planted."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mergekit_ot import AbstractSymmetry, ModelGraph, Order, Orthogonal, OrthogonalWithFixedMean, RotaryPlanes, Sign
from mergekit_ot.api import trace_model
from mergekit_ot.graph.normal_form.find import find_normal_form
from mergekit_ot.graph.normal_form.form import NormalForm
from mergekit_ot.graph.symmetry.planted import PlantedProof, find_proven
from mergekit_ot.graph.symmetry.rotary import with_rotary_groups
from mergekit_ot.graph.symmetry.transformation import Transformation

WIDTH, VOCABULARY, LENGTH = 12, 20, 6
TOKENS = torch.randint(0, VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(4, LENGTH, 5, generator=torch.Generator().manual_seed(1))


class Heads(nn.Module):
    """Attention with as many key heads as query heads, or fewer; with rotary positions or without."""

    def __init__(
        self, bias: bool, is_rotary: bool = False, key_heads: int = 2, heads: int = 2, width: int = WIDTH
    ) -> None:
        super().__init__()
        self.size, self.heads, self.key_heads, self.is_rotary = 4, heads, key_heads, is_rotary
        self.q, self.o = nn.Linear(width, 4 * heads, bias=bias), nn.Linear(4 * heads, width, bias=bias)
        self.k, self.v = (nn.Linear(width, 4 * key_heads, bias=bias) for _ in range(2))
        angles = torch.outer(torch.arange(LENGTH), torch.tensor([1.0, 0.3])).repeat(1, 2)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cosine + torch.cat([-second, first], -1) * self.sine

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (self.heads, 4)).transpose(1, 2)
        k, v = (part(x).unflatten(-1, (self.key_heads, 4)).transpose(1, 2) for part in (self.k, self.v))
        if self.is_rotary:
            q, k = self.turned(q), self.turned(k)
        k, v = (part.repeat_interleave(self.heads // self.key_heads, 1) for part in (k, v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """Neurons that are products of an activated gate and a linear map."""

    def __init__(self, neurons: int = 7, width: int = WIDTH) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(width, neurons), nn.Linear(width, neurons)
        self.down = nn.Linear(neurons, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Decoder(nn.Module):
    """A language model of one kind: ``gpt`` (LayerNorm, positions, biases), ``llama`` (RMSNorm, rotary, gated)."""

    def __init__(
        self,
        kind: str = "gpt",
        is_tied: bool = False,
        key_heads: int | None = None,
        layers: int = 2,
        *,
        heads: int = 2,
        neurons: int = 9,
        width: int = WIDTH,
    ) -> None:
        super().__init__()
        is_gpt = kind == "gpt"
        norm = nn.LayerNorm if is_gpt else nn.RMSNorm
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Parameter(torch.randn(LENGTH, width)) if is_gpt else None
        self.norms = nn.ModuleList(norm(width) for _ in range(2 * layers + 1))
        self.heads = nn.ModuleList(Heads(is_gpt, not is_gpt, key_heads or heads, heads, width) for _ in range(layers))
        plain = lambda: nn.Sequential(nn.Linear(width, neurons), nn.GELU(), nn.Linear(neurons, width))  # noqa: E731
        self.neurons = nn.ModuleList(plain() if is_gpt else Gated(neurons, width) for _ in range(layers))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        if is_tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x if self.positions is None else x + self.positions
        for number, (heads, neurons) in enumerate(zip(self.heads, self.neurons, strict=True)):
            x = x + heads(self.norms[2 * number](x))
            x = x + neurons(self.norms[2 * number + 1](x))
        return self.head(self.norms[-1](x))


class PostNorm(nn.Module):
    """A residual stream that is normalised after every sum: its gains are read by the next sum."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 3)
        self.heads, self.norms = Heads(True), nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norms[0](self.embed(x))
        return self.head(self.norms[1](x + self.heads(x)))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "gpt": (Decoder, TOKENS),
    "llama": (lambda: Decoder("llama"), TOKENS),
    "llama, grouped queries": (lambda: Decoder("llama", key_heads=1), TOKENS),
}


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A network with random weights, gains and biases in double precision."""
    torch.manual_seed(seed)
    model = make().double().eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        parameter.data = noise / fan_in**0.5 if parameter.ndim > 1 else parameter.data.double() + 0.3 * noise
    return model


def named_graph(make: Callable[[], nn.Module], inputs: Tensor) -> ModelGraph:
    """The graph of a network, with names for the planes that positions turn."""
    return with_rotary_groups(trace_model(make(), inputs))


def symmetries_of(
    make: Callable[[], nn.Module], inputs: Tensor
) -> tuple[ModelGraph, NormalForm, dict[AbstractSymmetry, Mapping]]:
    """The graph, the normal form, and where each symmetry holds."""
    graph = named_graph(make, inputs)
    form = find_normal_form(graph, make, (inputs,))
    proof = PlantedProof(make, (inputs,), form=form)
    kinds = (Order(), Sign(), Orthogonal(), OrthogonalWithFixedMean(), RotaryPlanes())
    return graph, form, {kind: find_proven(kind, graph, proof) for kind in kinds}


def planted_copy(model: nn.Module, make: Callable[[], nn.Module], inputs: Tensor, seed: int = 0) -> nn.Module:
    """The same function with other weights: random orders, signs and rotations of everything that allows them."""
    graph, form, symmetries = symmetries_of(make, inputs)
    generator = torch.Generator().manual_seed(seed)
    state = form.of_state(model.state_dict())
    for symmetry, places in symmetries.items():
        state = Transformation.random(symmetry, graph, places, generator).of_state(state)
    copy = make().double().eval()
    copy.load_state_dict(state)
    return copy


def apart(one: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    """The largest difference of two networks' outputs, relative to their scale."""
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    with torch.no_grad():
        ours, theirs = one.double()(inputs), other.double()(inputs)
    return float((ours - theirs).abs().max() / ours.abs().max())
