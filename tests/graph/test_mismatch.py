"""Networks that differ by more than neuron counts: what differs is named, in words that whoever trained them knows."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn

from mergekit_ot import fuse, trace_model
from mergekit_ot.errors import GraphMismatchError

TOKENS = torch.randint(0, 7, (2, 6), generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(2, 1, 6, 6)
# What the layouts of the graph are written in, and no user has to know.
NOTATION = re.compile(r"\d!|weight:\d|×.*\[")


class Blocks(nn.Module):
    def __init__(self, classes: int = 3, depth: int = 2, kernel: int = 3, adds: bool = True) -> None:
        super().__init__()
        self.adds = adds
        self.stem = nn.Conv2d(1, 4, kernel, padding=kernel // 2)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(depth))
        self.fc = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for block in self.blocks:
            x = x + block(x).relu() if self.adds else block(x).relu()
        return self.fc(x.mean((2, 3)))


class Language(nn.Module):
    """A language model with one layer of rotary attention; key heads may serve several query heads."""

    def __init__(
        self,
        vocabulary: int = 11,
        size: int = 4,
        heads: int = 2,
        key_heads: int = 2,
        places: int = 8,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.heads, self.key_heads = size, heads, key_heads
        self.embedding, self.positions = nn.Embedding(vocabulary, 8), nn.Embedding(places, 8)
        self.q, self.o = nn.Linear(8, heads * size), nn.Linear(heads * size, 8)
        self.k, self.v = (nn.Linear(8, key_heads * size) for _ in range(2))
        self.head = nn.Linear(8, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        angles = torch.outer(torch.arange(6), torch.arange(1, size // 2 + 1).float()).repeat(1, 2)
        self.register_buffer("cosine", angles.cos(), persistent=False)
        self.register_buffer("sine", angles.sin(), persistent=False)

    def turned(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cosine + torch.cat([-second, first], -1) * self.sine

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        q = self.turned(self.q(x).unflatten(-1, (self.heads, self.size)).transpose(1, 2))
        k, v = (part(x).unflatten(-1, (self.key_heads, self.size)).transpose(1, 2) for part in (self.k, self.v))
        k, v = (part.repeat_interleave(self.heads // self.key_heads, 1) for part in (self.turned(k), v))
        attended = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.head(x + self.o(attended.transpose(1, 2).flatten(2)))


KINDS = {
    "classes": (Blocks(), Blocks(classes=5), IMAGES, "heads have 3 and 5 classes", "--keep 'fc.*'; or .*--head both"),
    "kernels": (Blocks(), Blocks(kernel=5), IMAGES, "kernels have 3 and 5 places", "--keep 'stem.*'"),
    "depth": (
        Blocks(adds=False),
        Blocks(depth=3, adds=False),
        IMAGES,
        "depth differs: source 0 has 2 layers of 'blocks' and source 1 has 3",
        "'blocks.2.weight' of source 1",
    ),
    "vocabulary": (
        Language(),
        Language(13),
        TOKENS,
        "vocabularies have 11 and 13 tokens",
        "--keep 'embedding.*' --keep 'head.*'",
    ),
    "tied vocabulary": (
        Language(tied=True),
        Language(13, tied=True),
        TOKENS,
        "vocabularies have 11 and 13 tokens",
        "--keep 'embedding.*'",
    ),
    "positions": (
        Language(),
        Language(places=9),
        TOKENS,
        "position embeddings have 8 and 9 places",
        "--keep 'positions.*'",
    ),
    "size of heads": (
        Language(),
        Language(size=6),
        TOKENS,
        "heads of source 0 have 4 dimensions and those of source 1 have 6, and rotary",
        "'q.weight', axis 0",
    ),
    "key heads": (
        Language(),
        Language(key_heads=1),
        TOKENS,
        "Grouped queries: source 0 has 2 key heads and source 1 has 1",
        "both have to group their queries",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_difference_is_named_as_what_it_is(kind: str) -> None:
    one, other, inputs, what, way_out = KINDS[kind]
    with pytest.raises(GraphMismatchError, match=what) as raised:
        fuse([one, other], example_inputs=inputs)
    message = str(raised.value)
    assert re.search(way_out, message), message
    assert not NOTATION.search(message), message


def test_more_key_heads_than_one_are_told_by_their_numbers() -> None:
    match = "Grouped queries: source 0 has 4 key heads and source 1 has 2"
    with pytest.raises(GraphMismatchError, match=match) as raised:
        fuse([Language(heads=4, key_heads=4), Language(heads=4, key_heads=2)], example_inputs=TOKENS)
    assert not NOTATION.search(str(raised.value))


def test_what_is_kept_may_differ_in_places_that_stay() -> None:
    graphs = [trace_model(net, IMAGES) for net in (Blocks(), Blocks(5))]
    graphs[0].check_same_structure(graphs[1], "one", "other", {"fc.weight", "fc.bias"})
    with pytest.raises(GraphMismatchError, match=r"'fc\.bias', axis 0"):
        graphs[0].check_same_structure(graphs[1], "one", "other", {"fc.weight"})


class Placed(nn.Module):
    """A token and places, which have a table of positions together."""

    def __init__(self, places: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(1, places + 1, 8))
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.read, self.write = nn.Linear(4, 8), nn.Linear(8, 3)
        self.places = places

    def forward(self, inputs: Tensor) -> Tensor:
        placed = torch.cat([self.token.expand(len(inputs), -1, -1), self.read(inputs[:, : self.places])], 1)
        return self.write((placed + self.positions).relu().mean(1))


def test_places_of_a_table_are_counted() -> None:
    with pytest.raises(GraphMismatchError) as raised:
        fuse([Placed(4), Placed(9)], example_inputs=torch.randn(2, 9, 4))
    assert "Axis 1 of parameter 'positions' has 5 places in source 0 but 10 in source 1" in str(raised.value)
