"""One trace per architecture: modules are compared by what they are set to, or else by identity."""

from __future__ import annotations

import copy
import enum
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mergekit_ot import FusionInputs, FusionOptions, fuse, trace_model
from mergekit_ot.fusion.tracing import is_same_architecture
from mergekit_ot.hooks.manager import default_manager
from mergekit_ot.hooks.preparing import prepare

INPUTS = torch.zeros(2, 4)


class Kind(enum.Enum):
    """Of a network."""

    PLAIN = 0
    OTHER = 1


@dataclass
class Chosen:
    """A configuration."""

    width: int = 8
    names: list[str] = field(default_factory=lambda: ["relu"])


class Settings:
    """A configuration that compares by identity, as those of libraries do."""

    def __init__(self, **values: object) -> None:
        vars(self).update(values)


class Slotted:
    """A configuration without a dictionary."""

    __slots__ = ("width",)

    def __init__(self, width: int) -> None:
        self.width = width


class Net(nn.Module):
    """A network that holds one more thing."""

    def __init__(self, held: object) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.held = held

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(inputs)))


def ringed(width: int) -> Settings:
    ring = Settings(width=width)
    vars(ring)["me"] = [ring]
    return ring


def adding(number: float) -> Callable[[float], float]:
    return lambda value: value + number


HELD: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "numbers": (lambda: [1, 2.5], lambda: [1, 2.25]),
    "kinds of numbers": (lambda: [1], lambda: [True]),
    "floats and whole numbers": (lambda: {"a": 1.0}, lambda: {"a": 1}),
    "strings": (lambda: {"a": ("b",)}, lambda: {"a": ("c",)}),
    "keys": (lambda: {"a": [1]}, lambda: {"b": [1]}),
    "order of keys": (lambda: {"a": 1, "b": 2}, lambda: {"b": 2, "a": 1}),
    "sets": (lambda: {"a", "b", "c"}, lambda: {"a", "b"}),
    "members": (lambda: Kind.PLAIN, lambda: Kind.OTHER),
    "data classes": (Chosen, lambda: Chosen(names=["gelu"])),
    "objects": (lambda: Settings(act="relu"), lambda: Settings(act="gelu")),
    "objects in objects": (lambda: Settings(a=Settings(b=[1])), lambda: Settings(a=Settings(b=[2]))),
    "objects that hold themselves": (lambda: ringed(1), lambda: ringed(2)),
    "slots": (lambda: Slotted(1), lambda: Slotted(2)),
    "types": (lambda: torch.float32, lambda: torch.float64),
    "classes": (lambda: [nn.ReLU], lambda: [nn.GELU]),
    "arrays": (lambda: np.arange(3.0), lambda: np.arange(3)),
    "tensors": (lambda: [torch.arange(3)], lambda: [torch.ones(3, dtype=torch.int64)]),
    "functions": (lambda: torch.relu, lambda: torch.tanh),
    "closures": (lambda: adding(1.0), lambda: adding(2.0)),
    "partial functions": (lambda: functools.partial(adding, 1), lambda: functools.partial(adding, number=1)),
    "methods": (lambda: Chosen().names.append, lambda: Chosen().names.extend),
    "shared lists": (lambda: [[0]] * 2, lambda: [[0], [0]]),
}
# What has no value to compare: two of them are never the same.
ALONE = {
    "a bare object": object,
    "a generator": lambda: torch.Generator().manual_seed(0),
    "an iterator": lambda: iter([1]),
    "a class of the same name": lambda: type("Made", (), {}),
    "a bound method of a list": lambda: [1].append,
}


@pytest.mark.parametrize("case", sorted(HELD.keys() - {"methods"}))
def test_what_a_module_holds_is_compared_by_value(case: str) -> None:
    held, other = HELD[case]
    assert is_same_architecture(Net(held()), Net(held()))
    assert is_same_architecture(Net(Settings(inside=held())), Net(Settings(inside=held())))
    assert not is_same_architecture(Net(held()), Net(other()))
    assert not is_same_architecture(Net(Settings(inside=held())), Net(Settings(inside=other())))


@pytest.mark.parametrize("case", sorted(ALONE))
def test_what_has_no_value_is_compared_by_identity(case: str) -> None:
    held = ALONE[case]()
    assert is_same_architecture(Net([held]), Net([held]))
    assert not is_same_architecture(Net([held]), Net([ALONE[case]()]))


def test_a_hook_makes_another_network() -> None:
    plain, hooked, other = Net(0), Net(0), Net(0)
    hooked.first.register_forward_hook(lambda module, inputs, output: -output)
    other.first.register_forward_hook(lambda module, inputs, output: 2 * output)
    assert not is_same_architecture(plain, hooked)
    assert not is_same_architecture(hooked, other)
    assert is_same_architecture(hooked, copy.deepcopy(hooked))


def test_what_no_file_brings_must_be_the_same() -> None:
    def made(scale: float, *, is_saved: bool) -> Net:
        net = Net(0)
        net.register_buffer("scale", torch.full((8,), scale), persistent=is_saved)
        return net

    assert is_same_architecture(made(1.0, is_saved=True), made(2.0, is_saved=True))
    assert is_same_architecture(made(1.0, is_saved=False), made(1.0, is_saved=False))
    assert not is_same_architecture(made(1.0, is_saved=False), made(2.0, is_saved=False))
    assert not is_same_architecture(made(1.0, is_saved=True), made(1.0, is_saved=False))


def test_weights_that_a_hook_computes_are_no_settings() -> None:
    def made() -> nn.Module:
        net = Net(0)
        with pytest.warns(FutureWarning):
            net.last = nn.utils.weight_norm(net.last)
        return net

    assert is_same_architecture(made(), made())


def traces(models: list[nn.Module], inputs: Tensor) -> int:
    """Returns how often a fusion traces."""
    calls = []

    def counting(model: nn.Module, *arguments: Any, **named: Any) -> Any:
        calls.append(type(model))
        return trace_model(model, *arguments, **named)

    prepare(FusionInputs(models, example_inputs=inputs), FusionOptions(), default_manager(), counting)
    return len(calls)


def test_a_configuration_object_per_network_is_one_architecture() -> None:
    nets: list[nn.Module] = [Net(Settings(act="relu", name_or_path=f"folder {number}")) for number in range(3)]
    assert traces(nets, INPUTS) == 1
    assert traces([*nets, Net(Settings(act="gelu"))], INPUTS) == 2


def test_a_shared_trace_fuses_as_traces_of_each_do() -> None:
    torch.manual_seed(0)
    shared = [Net(Settings(act="relu")) for _ in range(3)]
    apart = []
    for number, net in enumerate(shared):
        apart.append(Net(Settings(number=number)))
        apart[-1].load_state_dict(net.state_dict())
    assert traces(list(apart), INPUTS) == 3
    one, three = (fuse(nets, example_inputs=INPUTS).state for nets in (shared, apart))
    assert all(torch.equal(one[name], three[name]) for name in three)


@pytest.mark.parametrize("kind", ["llama", pytest.param("bert", marks=pytest.mark.slow)])
def test_networks_of_transformers_are_traced_once(kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 32,
    }

    def made(**changed: Any) -> nn.Module:
        if kind == "bert":
            return transformers.BertModel(transformers.BertConfig(**sizes, **changed))
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, pad_token_id=0, **changed))

    tokens = torch.randint(1, 32, (2, 5))
    nets = [made() for _ in range(3)]
    vars(nets[1])["name_or_path"] = "another/folder"
    assert traces(nets, tokens) == 1
    nets[2] = made(hidden_act="gelu_new")
    assert traces(nets, tokens) == 2
