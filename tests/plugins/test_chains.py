"""Chains are guessed where names and shapes leave room for nothing else, and refused wherever they do."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mergeot_chains.chain import chain
from torch import Tensor, nn

from mergekit_ot import ArchitectureError, Guess, PluginManager, default_manager, hookimpl, trace_model
from mergekit_ot.graph.layouts import layout_text
from mergekit_ot.sources.reading import read_sources

_LAW = settings(max_examples=3, deadline=None)


def guessed(network: nn.Module, *, is_confirmed: bool = False, **arguments: object) -> Guess:
    return chain(_shapes(network), is_confirmed=is_confirmed, arguments=arguments)


def _shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


_Members = dict[str, set[tuple[str, int, str]]]


def _groups(network: nn.Module, inputs: Tensor) -> tuple[_Members, dict[str, list[str]]]:
    graph = trace_model(network, inputs)
    members: _Members = {
        key: {(slot.parameter, slot.axis, slot.role) for slot in group.members}
        for key, group in graph.free_groups.items()
    }
    layouts = {name: [layout_text(axis) for axis in axes] for name, axes in graph.layouts.items()}
    return members, layouts


def assert_guess_is_right(network: nn.Module, inputs: Tensor, **arguments: object) -> None:
    """The guess has the names and shapes of a network, and its neuron groups."""
    module = guessed(network, **arguments).build_module()
    assert _shapes(module) == _shapes(network)
    module.load_state_dict(network.state_dict())
    true, found = _groups(network, inputs), _groups(module, inputs)
    assert found == true
    assert true[0]  # something is free, so that there is something to compare


class Flat(nn.Module):
    """Layers as attributes, run in order with functions between them."""

    def __init__(self, layers: dict[str, nn.Module], between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.names, self.between = list(layers), between

    def forward(self, values: Tensor) -> Tensor:
        for number, name in enumerate(self.names):
            layer = self.get_submodule(name)
            if isinstance(layer, nn.Linear) and values.dim() == 4:
                values = values.flatten(1)
            values = layer(values)
            if isinstance(layer, nn.GRU | nn.LSTM | nn.RNN):
                values = values[0]
            elif number < len(self.names) - 1 and not isinstance(layer, nn.Embedding):
                values = self.between(values)
        return values


_SIZES = st.lists(st.integers(3, 40), min_size=3, max_size=5)


@given(
    _SIZES.filter(lambda sizes: len(set(sizes)) == len(sizes)), st.booleans(), st.sampled_from(["fc", "lin", "layer"])
)
@_LAW
def test_flat_perceptrons(sizes: list[int], bias: bool, stem: str) -> None:
    layers = {f"{stem}{number}": nn.Linear(*pair, bias=bias) for number, pair in enumerate(pairwise(sizes), start=1)}
    assert_guess_is_right(Flat(layers, torch.sigmoid), torch.randn(2, sizes[0]))


@given(_SIZES, st.booleans(), st.sampled_from(["", "net.", "model.layers."]), st.data())
@_LAW
def test_sequences_may_repeat_a_width(sizes: list[int], has_norm: bool, prefix: str, data: st.DataObject) -> None:
    children: list[nn.Module] = []
    for pair in pairwise(sizes):
        children += [nn.Linear(*pair), *([nn.BatchNorm1d(pair[1])] if has_norm else []), nn.ReLU()]
        children += [nn.Dropout(0.5)] if data.draw(st.booleans()) else []
    network: nn.Module = nn.Sequential(*children[:-1])
    for name in reversed(prefix.split(".")[:-1]):
        network = nn.Sequential(OrderedDict({name: network}))
    assert_guess_is_right(network, torch.randn(2, sizes[0]))


@given(st.lists(st.integers(2, 12), min_size=2, max_size=4, unique=True), st.booleans(), st.integers(1, 3))
@_LAW
def test_convolutions_then_linear_layers(channels: list[int], has_norm: bool, side: int) -> None:
    layers: dict[str, nn.Module] = {}
    for number, pair in enumerate(pairwise(channels), start=1):
        layers[f"conv{number}"] = nn.Conv2d(*pair, 3, stride=2, padding=1)
        if has_norm:
            layers[f"bn{number}"] = nn.BatchNorm2d(pair[1])
    layers |= {"fc1": nn.Linear(channels[-1] * side**2, 31), "fc2": nn.Linear(31, 29)}
    size = side * 2 ** (len(channels) - 1)
    assert_guess_is_right(Flat(layers, torch.tanh), torch.randn(2, channels[0], size, size))


@given(st.booleans(), st.sampled_from([nn.LSTM, nn.GRU, nn.RNN]), st.integers(1, 2), st.booleans(), st.booleans())
@_LAW
def test_recurrent_layers(embeds: bool, kind: type, depth: int, bias: bool, both: bool) -> None:
    recurrent = kind(5, 7, depth, bias=bias, bidirectional=both, batch_first=True)
    layers: dict[str, nn.Module] = {"encoder": nn.Embedding(11, 5)} if embeds else {}
    layers |= {"rnn": recurrent, "decoder": nn.Linear(7 * (1 + both), 11)}
    inputs = torch.randint(11, (2, 4)) if embeds else torch.randn(2, 4, 5)
    assert_guess_is_right(Flat(layers, torch.relu), inputs)


def test_a_vgg_of_two_sequences_and_one_of_many() -> None:
    features = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    features += [nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    classifier = [nn.Linear(8 * 16, 20), nn.ReLU(), nn.Dropout(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 5)]

    class Vgg(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features, self.classifier = nn.Sequential(*features), nn.Sequential(*classifier)

        def forward(self, images: Tensor) -> Tensor:
            return self.classifier(self.features(images).flatten(1))

    assert_guess_is_right(Vgg(), torch.randn(2, 3, 8, 8))
    parts = {
        f"layer{number}": nn.Sequential(nn.Conv2d(*pair, 3, padding=1), nn.BatchNorm2d(pair[1]), nn.ReLU())
        for number, pair in enumerate(pairwise((3, 6, 12)), start=1)
    }
    assert_guess_is_right(
        nn.Sequential(OrderedDict(parts | {"fc": nn.Sequential(nn.Flatten(), nn.Linear(48, 5))})),
        torch.randn(2, 3, 2, 2),
    )


def test_counters_before_all_else_do_not_hide_the_order_of_the_alphabet() -> None:
    # So a safetensors file has them: by type, then by name. Before or behind its layer, a norm tells nothing then.
    layers = {"conv1": nn.Conv2d(6, 6, 3), "bn1": nn.BatchNorm2d(6), "conv2": nn.Conv2d(6, 6, 3), "fc": nn.Linear(6, 2)}
    shapes = _shapes(nn.ModuleDict(layers))
    ordered = sorted(shapes, key=lambda name: (not name.endswith("tracked"), name))
    with pytest.raises(ArchitectureError, match="Where the norm 'bn1'"):
        chain({name: shapes[name] for name in ordered}, is_confirmed=True, arguments={})
    assert chain(shapes, is_confirmed=True, arguments={}).arguments["stages"][1].path == "bn1"


def test_names_in_alphabetical_order_are_put_in_order() -> None:
    sizes = (5, 9, 9, 9, 9, 9, 9, 4)
    layers = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    network = nn.Sequential(*layers)
    shapes = dict(sorted(_shapes(network).items()))
    assert list(shapes)[2] == "10.bias"
    guess = chain(shapes, is_confirmed=False, arguments={})
    assert list(guess.build_module().state_dict()) == list(network.state_dict())
    convolutional = {
        "conv1": nn.Conv2d(1, 3, 3),
        "bn1": nn.BatchNorm2d(3),
        "fc": nn.Linear(3 * 4, 9),
        "out": nn.Linear(9, 2),
    }
    shapes = dict(sorted(_shapes(Flat(convolutional, torch.relu)).items()))
    assert (
        "a chain of a convolution 1-3 and 2 linear layers 12-9-2"
        in chain(shapes, is_confirmed=False, arguments={}).sentence
    )


# Networks that are no chain, or of which only their code tells whether they are one.


class Residual(nn.Module):
    """Equal widths with shortcuts, under the names of a plain network."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.fc1, self.depth = nn.Linear(3, width), depth
        for number in range(2, depth + 2):
            self.add_module(f"fc{number}", nn.Linear(width, width))
        self.out = nn.Linear(width, 2)


@given(st.integers(4, 20), st.integers(1, 4))
@_LAW
def test_shortcuts_under_plain_names_are_refused(width: int, depth: int) -> None:
    with pytest.raises(ArchitectureError, match=rf"both have {width} numbers, so that a shortcut.*--arch chain"):
        guessed(Residual(width, depth))


@given(_SIZES, st.data())
@_LAW
def test_any_two_equal_widths_that_are_seen_are_refused(sizes: list[int], data: st.DataObject) -> None:
    one, other = sorted(data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=2, max_size=2, unique=True)))
    widths = [100 + number for number in range(len(sizes))]
    widths[other] = widths[one]
    layers = {f"fc{number}": nn.Linear(*pair) for number, pair in enumerate(pairwise(widths), start=1)}
    if (one, other) == (0, len(sizes) - 1):
        # The inputs and outputs of the whole keep their order, joined or not.
        assert_guess_is_right(Flat(layers, torch.relu), torch.randn(2, widths[0]))
    else:
        with pytest.raises(ArchitectureError, match="shortcut could join them"):
            guessed(Flat(layers, torch.relu))


class Wired(nn.Module):
    """Linear layers of which each reads any earlier value of its width, or the sum of two: most are no chains."""

    def __init__(self, inputs: int, layers: list[tuple[tuple[int, ...], int, int]]) -> None:
        super().__init__()
        self.reads = [reads for reads, _, _ in layers]
        self.width = inputs
        for number, (_, width, outputs) in enumerate(layers, start=1):
            self.add_module(f"fc{number}", nn.Linear(width, outputs))
        read = {index for reads in self.reads for index in reads}
        self.ends = [index for index in range(1, len(layers) + 1) if index not in read]

    def forward(self, values: Tensor) -> tuple[Tensor, ...]:
        made = [values]
        for number, reads in enumerate(self.reads, start=1):
            read = made[reads[0]] if len(reads) == 1 else made[reads[0]] + made[reads[1]]
            made.append(torch.tanh(self.get_submodule(f"fc{number}")(read)))
        return tuple(made[index] for index in self.ends)


@st.composite
def _wired(draw: st.DrawFn) -> Wired:
    widths = [draw(st.integers(3, 8))]
    layers: list[tuple[tuple[int, ...], int, int]] = []
    for number in range(draw(st.integers(2, 4))):
        # Mostly the value before, so that some are chains.
        first = draw(st.sampled_from([number, number, number, *range(number + 1)]))
        equal = [index for index in range(number + 1) if widths[index] == widths[first] and index != first]
        others = [(first, draw(st.sampled_from(equal)))] if equal else []
        reads = draw(st.sampled_from([(first,), *others]))
        layers.append((reads, widths[first], draw(st.integers(3, 8))))
        widths.append(layers[-1][2])
    return Wired(widths[0], layers)


def assert_no_group_is_made_up(network: Wired) -> None:
    """What is guessed has no group that the network does not have."""
    try:
        guess = guessed(network)
    except ArchitectureError:
        return
    inputs = torch.randn(2, network.width)
    true, found = _groups(network, inputs), _groups(guess.build_module(), inputs)
    assert all(true[0].get(key) == members for key, members in found[0].items())


@given(_wired())
@settings(max_examples=10, deadline=None)
def test_whatever_is_guessed_is_true(network: Wired) -> None:
    assert_no_group_is_made_up(network)


@pytest.mark.slow
@given(_wired())
@settings(max_examples=120, deadline=None)
def test_whatever_is_guessed_is_true_of_many(network: Wired) -> None:
    assert_no_group_is_made_up(network)


def _modules(**layers: nn.Module) -> nn.Module:
    return nn.ModuleDict(layers)


REFUSED = {
    "two heads": (lambda: _modules(fc1=nn.Linear(4, 9), head=nn.Linear(9, 2), out=nn.Linear(9, 1)), "does not follow"),
    "an actor and its critic": (
        lambda: _modules(actor=nn.Linear(4, 9), critic=nn.Linear(9, 1)),
        "may be a second network, a branch or a head",
    ),
    "a generator before its judge": (
        lambda: _modules(G=nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 7)), D=nn.Linear(7, 1)),
        "second network",
    ),
    "two parallel encoders": (lambda: _modules(fc1=nn.Linear(4, 9), fc2=nn.Linear(4, 9)), "does not follow"),
    "a mean and a variance": (
        lambda: _modules(fc1=nn.Linear(4, 9), fc21=nn.Linear(9, 2), fc22=nn.Linear(9, 2), fc3=nn.Linear(2, 9)),
        "does not follow",
    ),
    "blocks of a residual network": (
        lambda: _modules(conv1=nn.Conv2d(3, 4, 3), layer1=nn.Sequential(_modules(conv1=nn.Conv2d(4, 8, 3)))),
        "such blocks often have shortcuts",
    ),
    "a list of layers without gaps": (
        lambda: nn.Sequential(nn.Linear(4, 9), nn.Linear(9, 9), nn.Linear(9, 2)),
        "both have 9 numbers",
    ),
    "a shortcut around a sequence": (
        lambda: _modules(fc_in=nn.Linear(4, 9), layers=nn.Sequential(nn.Linear(9, 5), nn.ReLU(), nn.Linear(5, 9))),
        "both have 9 numbers",
    ),
    "a gate on pooled channels": (
        lambda: _modules(conv1=nn.Conv2d(3, 16, 3), fc1=nn.Linear(16, 4), fc2=nn.Linear(4, 16), out=nn.Linear(16, 2)),
        "both have 16 numbers",
    ),
    "two heads without biases": (
        lambda: _modules(fc1=nn.Linear(9, 5, bias=False), fc2=nn.Linear(9, 2)),
        "does not follow",
    ),
    "a head before what it reads": (
        lambda: _modules(fc=nn.Linear(9, 5, bias=False), rnn=nn.GRU(9, 7)),
        "does not follow",
    ),
    "a norm that is no part of the sequence": (
        lambda: _modules(
            features=nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 7)),
            bn1=nn.BatchNorm1d(9),
            fc=nn.Linear(7, 2),
        ),
        "0 places",
    ),
    "concatenated inputs": (lambda: _modules(fc1=nn.Linear(4, 9), fc2=nn.Linear(13, 2)), "does not follow"),
    "a gated unit": (lambda: _modules(fc1=nn.Linear(4, 18), fc2=nn.Linear(9, 2)), "does not follow"),
    "grouped convolutions": (
        lambda: _modules(conv1=nn.Conv2d(3, 8, 3), conv2=nn.Conv2d(8, 8, 3, groups=4), fc=nn.Linear(8, 2)),
        "in groups",
    ),
    "a transposed convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 8, 2), nn.ReLU(), nn.Conv2d(8, 3, 3)
        ),
        "transposed",
    ),
    "a layer norm": (lambda: _modules(fc1=nn.Linear(4, 9), norm=nn.LayerNorm(9), fc2=nn.Linear(9, 2)), "LayerNorm"),
    "attention": (lambda: nn.TransformerEncoderLayer(8, 2), "belongs to no layer"),
    "a projected LSTM": (lambda: _modules(lstm=nn.LSTM(5, 7, proj_size=3), fc=nn.Linear(3, 2)), "projection"),
    "an LSTM as wide as its inputs": (lambda: _modules(lstm=nn.LSTM(7, 7), fc=nn.Linear(7, 2)), "both have 7"),
    "an embedding as wide as what follows": (
        lambda: _modules(encoder=nn.Embedding(11, 7), rnn=nn.GRU(7, 7), decoder=nn.Linear(7, 11)),
        "'encoder' and 'rnn' both have 7",
    ),
    "a square embedding": (
        lambda: _modules(encoder=nn.Embedding(7, 7), rnn=nn.GRU(7, 5), decoder=nn.Linear(5, 7)),
        "--arch 'chain.first=embedding' or --arch 'chain.first=linear'",
    ),
    "a convolution read by steps": (lambda: _modules(conv=nn.Conv1d(4, 9, 3), rnn=nn.GRU(9, 5)), "is not in the file"),
    "an image that is not square": (
        lambda: _modules(conv=nn.Conv2d(1, 3, 3), fc=nn.Linear(3 * 7, 2)),
        "no square image",
    ),
    "two poolings side by side": (lambda: _modules(conv=nn.Conv1d(1, 9, 3), fc=nn.Linear(18, 2)), "side by side"),
    "one layer": (lambda: _modules(fc=nn.Linear(4, 2)), "two or more"),
    "a parameter of its own": (
        lambda: nn.ParameterDict({"weight": nn.Parameter(torch.zeros(2, 3))}),
        "belong to no layers with names",
    ),
    "a norm of no place": (
        lambda: _modules(fc1=nn.Linear(4, 9), bn1=nn.BatchNorm1d(6), fc2=nn.Linear(9, 2)),
        "0 places",
    ),
    "numbers against the order": (lambda: _modules(fc2=nn.Linear(4, 9), fc1=nn.Linear(9, 2)), "against their numbers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_chain_is_refused_with_the_reason(name: str) -> None:
    build, reason = REFUSED[name]
    with pytest.raises(ArchitectureError, match=reason):
        guessed(build())


def test_a_confirmed_chain_needs_only_fit() -> None:
    layers = {"first": nn.Linear(4, 9), "bn1": nn.BatchNorm1d(9), "second": nn.Linear(9, 9), "bn2": nn.BatchNorm1d(9)}
    network = Flat(layers | {"third": nn.Linear(9, 2)}, torch.relu)
    assert_guess_is_right(network, torch.randn(2, 4), is_confirmed=True)
    with pytest.raises(ArchitectureError, match="does not follow"):
        guessed(_modules(a=nn.Linear(4, 9), b=nn.Linear(4, 9)), is_confirmed=True)


def test_norms_behind_all_layers_go_by_their_numbers_or_nowhere() -> None:
    layers = {
        "conv1": nn.Conv2d(1, 6, 3),
        "conv2": nn.Conv2d(6, 6, 3),
        "bn1": nn.BatchNorm2d(6),
        "bn2": nn.BatchNorm2d(6),
    }
    guess = guessed(nn.ModuleDict(layers | {"fc": nn.Linear(6, 2)}), is_confirmed=True)
    assert [stage.path for stage in guess.arguments["stages"] if getattr(stage, "path", "")] == [
        "conv1",
        "bn1",
        "conv2",
        "bn2",
        "fc",
    ]
    renamed = {name.replace("bn", "norm_"): layer for name, layer in layers.items()}
    renamed = {("norm_a" if name == "norm_1" else name): layer for name, layer in renamed.items()}
    with pytest.raises(ArchitectureError, match=r"Where the norm .* stands is not in the file"):
        guessed(nn.ModuleDict(renamed | {"fc": nn.Linear(6, 2)}), is_confirmed=True)


def test_what_the_user_says_makes_the_function_known() -> None:
    perceptron = nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2))
    assert "the activation" in guessed(perceptron).unknown
    known = guessed(perceptron, is_confirmed=True, activation="tanh")
    assert known.unknown == ""
    module = known.build_module()
    module.load_state_dict(perceptron.state_dict())
    inputs = torch.randn(5, 4)
    torch.testing.assert_close(module(inputs), perceptron(inputs))
    recurrent = _modules(lstm=nn.LSTM(5, 7, batch_first=True), fc=nn.Linear(7, 2))
    known = guessed(recurrent, is_confirmed=True, activation=None, steps="last")
    assert known.unknown == ""
    module = known.build_module()
    module.load_state_dict(recurrent.state_dict())
    steps = torch.randn(3, 6, 5)
    torch.testing.assert_close(module(steps), recurrent["fc"](recurrent["lstm"](steps)[0][:, -1]))
    with pytest.raises(ArchitectureError, match="Did you mean 'activation'"):
        guessed(perceptron, is_confirmed=True, activations="tanh")
    with pytest.raises(ArchitectureError, match=r"Known: .*tanh"):
        guessed(perceptron, is_confirmed=True, activation="tan")


def test_signs_are_left_alone_where_the_activation_was_guessed() -> None:
    # Between an LSTM and what reads it there may stand anything: a sign could be lost in it.
    recurrent = _modules(lstm=nn.LSTM(5, 7, batch_first=True), fc=nn.Linear(7, 2))
    stages = guessed(recurrent).arguments["stages"]
    assert [type(stage).__name__ for stage in stages] == ["Layer", "Activation", "Layer"]


class _Named:
    """Registers the guess of this package."""

    __name__ = "chains"

    @staticmethod
    @hookimpl
    def mergeot_guesses() -> dict[str, object]:
        return {"chain": chain}


def _manager() -> PluginManager:
    installed = default_manager()
    return installed if "chain" in installed.guesses else PluginManager([_Named()])


def test_a_weight_that_two_layers_share_is_seen(tmp_path) -> None:
    shared = nn.Embedding(11, 7)
    network = _modules(encoder=shared, rnn=nn.GRU(7, 7), decoder=nn.Linear(7, 11))
    network["decoder"].weight = shared.weight
    torch.save(network.state_dict(), tmp_path / "tied.pt")
    with pytest.raises(ArchitectureError, match=r"'encoder.weight' and 'decoder.weight' hold the same numbers"):
        read_sources([str(tmp_path / "tied.pt")], ("chain",), _manager(), lambda text: None)
    twice = nn.Linear(5, 5)
    repeated = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), twice, nn.ReLU(), twice, nn.ReLU(), nn.Linear(5, 2))
    torch.save(repeated.state_dict(), tmp_path / "repeated.pt")
    with pytest.raises(ArchitectureError, match=r"'2.weight' and '4.weight' hold the same numbers"):
        read_sources([str(tmp_path / "repeated.pt")], (), _manager(), lambda text: None)
