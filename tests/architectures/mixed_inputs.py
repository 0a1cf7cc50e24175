"""Inputs of several kinds: conditions that scale or make layers, categories, bags of words."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.base import Sample, images, numbers, tokens


class Film(nn.Module):
    """A second input scales and shifts the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(5, 7, 3, padding=1)
        self.condition = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 14))
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gamma, beta = self.condition(condition)[:, :, None, None].chunk(2, dim=1)
        x = (1 + gamma) * self.conv2(F.relu(self.conv1(x))) + beta
        return self.head(F.relu(x).mean((2, 3)))


class Bilinear(nn.Module):
    """Two inputs meet in a bilinear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 8)
        self.right = nn.Linear(5, 7)
        self.both = nn.Bilinear(8, 7, 9)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.tanh(self.both(torch.tanh(self.left(x)), torch.tanh(self.right(y)))))


class EmbeddingBag(nn.Module):
    """The mean of word vectors, classified."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(11, 6, mode="mean")
        self.hidden = nn.Linear(6, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(F.relu(self.hidden(self.words(words))))


class Hypernetwork(nn.Module):
    """A second input makes the weights of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.maker = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 7 * 8))
        self.first = nn.Linear(6, 8)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        weight = self.maker(condition).view(-1, 7, 8)
        x = F.relu(self.first(x))
        return self.head(F.relu(torch.bmm(weight, x.unsqueeze(2)).squeeze(2)))


class Tabular(nn.Module):
    """Two columns of categories are embedded and stand beside the normalised numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embeddings = nn.ModuleList([nn.Embedding(11, 5), nn.Embedding(13, 4)])
        self.norm = nn.BatchNorm1d(3)
        self.layers = nn.Sequential(
            *(nn.Linear(12, 9), nn.ReLU(), nn.BatchNorm1d(9), nn.Dropout(0.1)),
            *(nn.Linear(9, 8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 2)),
        )

    def forward(self, categories: Tensor, values: Tensor) -> Tensor:
        parts = [embedding(categories[:, column]) for column, embedding in enumerate(self.embeddings)]
        return self.layers(torch.cat([*parts, self.norm(values)], 1))


def _table() -> tuple[Tensor, ...]:
    return *tokens(11, 2, 4)(), *numbers(4, 3)()


INPUTS: dict[str, Sample] = {
    # Two convolutions and the hidden layer of the condition: 3 groups, 3 orders.
    "film": Sample(Film, lambda: (*images(3)(), *numbers(2, 6)())),
    # Left, right, and what they make together: 3 groups, 3 orders.
    "bilinear": Sample(Bilinear, lambda: (*numbers(2, 6)(), *numbers(2, 5)())),
    # The word vectors and the hidden layer: 2 groups, 2 orders.
    "embedding_bag": Sample(EmbeddingBag, tokens(11)),
    # The maker's hidden layer, and both sides of the weight that it makes: 3 groups, 3 orders.
    "hypernetwork": Sample(Hypernetwork, lambda: (*numbers(2, 6)(), *numbers(2, 4)())),
    # Two embeddings and two hidden layers: 4 groups, 4 orders.
    "tabular": Sample(Tabular, _table),
}
