"""Networks whose neurons may be negated, and copies of them with order and signs planted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from nets import Attention
from torch import Tensor, nn

from mergekit_ot import Coupling, ModelGraph, Permutation, Places, Sign, api, trace_model
from mergekit_ot.fusion.alignment import Alignment
from mergekit_ot.fusion.moving import transport_parameter
from mergekit_ot.graph.capture.description import ModuleDescription, described_module
from mergekit_ot.graph.symmetry.planted import PlantedProof, find_proven

SEQUENCES = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))


class Recurrent(nn.Module):
    """A recurrent layer of torch (or several), read as the mean over the steps."""

    def __init__(self, kind: type[nn.RNNBase], hidden: int = 5, **options: object) -> None:
        super().__init__()
        self.cell = kind(3, hidden, batch_first=True, **options)
        width = options.get("proj_size") or hidden
        self.head = nn.Linear(width * (1 + bool(options.get("bidirectional"))), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0].mean(1))


class CellLoop(nn.Module):
    """A recurrent cell of torch in a loop over the steps."""

    def __init__(self, kind: Callable[[int, int], nn.Module], hidden: int = 5) -> None:
        super().__init__()
        self.hidden, self.cell, self.head = hidden, kind(3, hidden), nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], self.hidden)
        memory = state
        for step in range(x.shape[1]):
            if isinstance(self.cell, nn.LSTMCell):
                state, memory = self.cell(x[:, step], (state, memory))
            else:
                state = self.cell(x[:, step], state)
        return self.head(state)


class TanhStream(nn.Module):
    """A residual stream behind ReLU with a tanh branch: only the branch's neurons may be negated."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down, self.head = (nn.Linear(a, b) for a, b in ((4, 6), (6, 7), (7, 6), (6, 2)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.embed(x))
        return self.head(torch.relu(x + self.down(torch.tanh(self.up(x)))))


class TanhAttention(Attention):
    """Attention with heads, on a stream that no sign passes, and a tanh branch behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(3, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(super().forward(x))))


def layers(*activations: nn.Module, sizes: tuple[int, ...] = (4, 5, 6, 2)) -> nn.Sequential:
    """Linear layers with an activation behind each but the last."""
    found: list[nn.Module] = [nn.Linear(sizes[0], sizes[1])]
    for place, activation in enumerate(activations, 1):
        found += [activation, nn.Linear(sizes[place], sizes[place + 1])]
    return nn.Sequential(*found)


def randomised(model: nn.Module, seed: int, scale: float = 1.0) -> nn.Module:
    """The model with Gaussian parameters of a spread that leaves activations their curvature."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter.shape[1:].numel() if parameter.ndim > 1 else 1
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return model.eval()


_GRAPHS: dict[tuple[object, ...], list[tuple[ModuleDescription, ModelGraph]]] = {}


def trace_once(model: nn.Module, inputs: Tensor | tuple[Tensor, ...], *arguments: object, **options: Any) -> ModelGraph:
    """The graph of a model, traced once for all models of its architecture: tracing takes most of a small fusion."""
    tensors = (inputs,) if isinstance(inputs, Tensor) else inputs
    key = (type(model), repr(model), repr(options), *((x.shape, x.dtype) for x in tensors))
    known, description = _GRAPHS.setdefault(key, []), described_module(model)
    for other, graph in known:
        if description.is_same(other):
            return graph
    known.append((description, trace_model(model, inputs, *arguments, **options)))  # type: ignore[arg-type]
    return known[-1][1]


@pytest.fixture
def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fusions of this test trace every architecture once."""
    monkeypatch.setattr(api, "trace_model", trace_once)


def traced(make: Callable[[], nn.Module], inputs: Tensor) -> tuple[ModelGraph, dict[str, Places]]:
    """The graph of a model, and the signs found on it."""
    graph = trace_once(make(), inputs)
    return graph, find_signs(graph, make, (inputs,))


def find_signs(graph: ModelGraph, make: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> dict[str, Places]:
    """The groups that may be negated, each with the numbers that change sign."""
    return find_proven(Sign(), graph, PlantedProof(make, inputs))


def moved(
    model: nn.Module, graph: ModelGraph, couplings: Mapping[str, Coupling], signs: Mapping[str, Places]
) -> nn.Module:
    """The model with its neurons moved by permutation couplings, negated where `signs` say."""
    alignment = Alignment(
        (graph,), graph, {key: (coupling,) for key, coupling in couplings.items()}, {Sign.name: signs}
    )
    result = copy.deepcopy(model)
    state = {
        name: transport_parameter(tensor, name, alignment, 0) if name in graph.layouts else tensor
        for name, tensor in model.state_dict().items()
    }
    result.load_state_dict(state)
    return result


def random_couplings(graph: ModelGraph, signs: Mapping[str, Places], seed: int) -> dict[str, Coupling]:
    """A random order of every group, with random signs (never all alike) where there are signs."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for key, group in graph.free_groups.items():
        sign = None
        if key in signs:
            sign = torch.ones(group.size)
            sign[torch.randperm(group.size, generator=generator)[: (group.size + 1) // 2]] = -1.0
        found[key] = Permutation(torch.randperm(group.size, generator=generator), sign=sign)
    return found


def planted_signs(model: nn.Module, make: Callable[[], nn.Module], inputs: Tensor, seed: int = 0) -> nn.Module:
    """The same function with every group in a random order, and negated at random where the network allows it."""
    graph, signs = traced(make, inputs)
    return moved(model, graph, random_couplings(graph, signs, seed), signs)


def relative_error(one: nn.Module, other: nn.Module, inputs: Tensor) -> float:
    """The largest difference of two models' outputs, relative to the second's."""
    with torch.no_grad():
        ours, theirs = one(inputs), other(inputs)
    return float((ours - theirs).abs().max() / theirs.abs().max())
