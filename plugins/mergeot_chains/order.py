"""In which order layers follow each other, and where something could stand between them that no file shows."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mergekit_ot import ArchitectureError
from mergeot_chains.layers import Layer

# Words that name a part of a plain chain, from its inputs to its outputs. What has another name may be anything: a
# second network, a branch, a head.
_WORDS = (
    ("embedding", "embeddings", "embed", "emb", "word_embedding", "word_embeddings"),
    ("features", "feature", "feature_extractor", "encoder", "encode", "enc"),
    ("conv", "convs", "convnet", "convnets", "cnn", "conv_layer", "conv_layers", "conv_block", "convolution", "c", "s"),
    ("layer", "layers", "net", "main", "model", "seq", "sequential", "stack", "block", "linear_relu_stack"),
    ("rnn", "lstm", "gru", "recurrent"),
    ("input", "input_layer", "fc_in", "in_layer", "hidden", "hidden_layer", "hidden_layers", "h", "hid", "bottleneck"),
    (
        "fc",
        "fcs",
        "f",
        "linear",
        "linears",
        "lin",
        "dense",
        "mlp",
        "l",
        "ll",
        "fully_connected",
        "fc_layer",
        "fc_layers",
    ),
    ("linear_layer", "linear_layers", "classifier", "regressor", "decoder", "decode", "dec", "head", "i", "ip"),
    ("out", "output", "outputs", "output_layer", "out_layer", "fc_out", "final", "last", "final_layer", "pred"),
)
_RANKS = {word: rank for rank, words in enumerate(_WORDS) for word in words}
_NORM_WORDS = {"bn", "norm", "batchnorm", "batch_norm", "bnorm", "batch_normalization", "n", "b"}
_NUMBERED = re.compile(r"(.*?)_?(\d+(?:_\d+)*)?([a-z])?")


@dataclass(frozen=True)
class Place:
    """Where a layer stands in the module tree, without the names that all layers share.

    Attributes:
        parents: Names of the modules around it.
        name: Its own name there.
    """

    parents: tuple[str, ...]
    name: str

    @property
    def index(self) -> int | None:
        """Its number in a list or sequence of modules."""
        return int(self.name) if self.name.isdigit() else None


def places_of(layers: Sequence[Layer]) -> dict[str, Place]:
    """Returns path → place.

    Example:
        >>> from mergeot_chains.layers import LINEAR
        >>> list(places_of([Layer("net.0", LINEAR, 4, 8), Layer("net.2", LINEAR, 8, 2)]).values())
        [Place(parents=(), name='0'), Place(parents=(), name='2')]
    """
    parts = {layer.path: layer.path.split(".") for layer in layers}
    shared = 0
    while all(
        len(path) > shared + 1 and path[shared] == first[shared]
        for path in parts.values()
        for first in [next(iter(parts.values()))]
    ):
        shared += 1
    return {name: Place(tuple(path[shared:-1]), path[-1]) for name, path in parts.items()}


def check_names(layers: Sequence[Layer], places: dict[str, Place], norms: Sequence[Layer]) -> None:
    """Checks that all names are such as the parts of a plain chain have.

    Raises:
        ArchitectureError: There are blocks in blocks, or a name that may stand for a second network or a branch.
    """
    for layer in (*layers, *norms):
        place = places[layer.path]
        if len(place.parents) > 1:
            raise ArchitectureError(
                f"'{layer.path}' stands in a block of several layers, and such blocks often have shortcuts, which no "
                "file shows."
            )
        for name in (*place.parents, place.name):
            word, _ = _numbered(name)
            is_norm = layer in norms and name == place.name
            if not name.isdigit() and word not in _RANKS and not (is_norm and word in _NORM_WORDS):
                raise ArchitectureError(
                    f"The name '{name}' of '{layer.path}' does not tell what part of a chain it is: it may be a second "
                    "network, a branch or a head."
                )


def _numbered(name: str) -> tuple[str, tuple[int, ...]]:
    """Returns a name without its number, and the number."""
    lower = name.lower()
    match = _NUMBERED.fullmatch(lower)
    if match is None or lower in _RANKS or lower in _NORM_WORDS:
        return lower, ()
    word, number, letter = match.groups()
    if number is None:
        return lower, ()
    digits = tuple(int(part) for part in number.split("_"))
    return word, (*digits, ord(letter)) if letter else digits


def number_of(layer: Layer, places: dict[str, Place]) -> tuple[int, ...]:
    """Returns the number in a layer's name; empty where there is none."""
    return _numbered(places[layer.path].name)[1]


def check_ascending(layers: Sequence[Layer], places: dict[str, Place]) -> None:
    """Checks that the numbers in names rise from layer to layer, among those of one word.

    Raises:
        ArchitectureError: They do not.
    """
    last: dict[tuple[object, str], tuple[tuple[int, ...], str]] = {}
    for layer in layers:
        place = places[layer.path]
        word, number = ("", (place.index,)) if place.index is not None else _numbered(place.name)
        before = last.get((place.parents, word))
        if before is not None and number <= before[0]:
            raise ArchitectureError(f"'{layer.path}' stands behind '{before[1]}' in the file, against their numbers.")
        last[place.parents, word] = (number, layer.path)


def by_names(layers: Sequence[Layer], places: dict[str, Place]) -> list[Layer]:
    """Returns layers in the order that their names tell, where the order of a file is that of the alphabet.

    Raises:
        ArchitectureError: Two names tell the same.
    """
    keys = {layer.path: _key(places[layer.path]) for layer in layers}
    ordered = sorted(layers, key=lambda layer: keys[layer.path])
    for one, other in itertools.pairwise(ordered):
        if keys[one.path] == keys[other.path]:
            raise ArchitectureError(
                f"The file has its tensors in alphabetical order, and the names '{one.path}' and '{other.path}' do not "
                "tell which comes first."
            )
    return ordered


def _key(place: Place) -> tuple[tuple[int, tuple[int, ...]], ...]:
    parts = (*place.parents, place.name)
    split = [("", (int(part),)) if part.isdigit() else _numbered(part) for part in parts]
    return tuple((_RANKS.get(word, len(_WORDS)) if word else -1, number) for word, number in split)


def names_a_beginning(place: Place) -> bool:
    """Whether a name says that a layer is the first: an embedding or an encoder."""
    word, _ = _numbered(place.name)
    return _RANKS.get(word, len(_WORDS)) <= _RANKS["encoder"]


def are_closed(one: Layer, other: Layer, places: Mapping[str, Place]) -> bool:
    """Whether nothing but the next layer can read what a layer gives: both stand in one `nn.Sequential`.

    A list of modules has the same names. But modules without tensors, such as activations, leave out numbers only where
    they are children themselves, and what runs such children one after the other has no shortcuts between them.
    """
    first, second = places[one.path], places[other.path]
    if first.index is None or second.index is None or first.parents != second.parents:
        return False
    taken = {place.index for place in places.values() if place.parents == first.parents}
    return any(number not in taken for number in range(first.index + 1, second.index))
