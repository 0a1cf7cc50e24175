"""What a diagnosis says: records that hold what was found, and give it as plain data."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any

from mergeot_diagnose.network import NetworkKind
from mergeot_diagnose.paths import Path
from mergeot_diagnose.rules import Advice
from mergeot_diagnose.weights import WeightComparison


class Basin(enum.Enum):
    """Whether networks lie in one basin: whether the straight path between them is flat.

    Attributes:
        ONE: It is; without data, their neurons are in one order.
        APART: It is not; without data, their neurons are in orders of their own.
        UNKNOWN: Neither can be said, or the path is flat though their neurons are in orders of their own.
    """

    ONE = "one basin"
    APART = "apart"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class LayerSimilarity:
    """How similar the neurons of one group are in two networks.

    Attributes:
        name: Key of the neuron group.
        sizes: Number of neurons in both.
        same_place: Share of the neurons whose partner stands at their own place; None where that means nothing.
        cka: Linear CKA on data (arXiv:1905.00414), or None without data.
    """

    name: str
    sizes: tuple[int, int]
    same_place: float | None
    cka: float | None


@dataclass(frozen=True)
class PairDiagnosis:
    """What two of the networks have in common.

    Attributes:
        names: Their names.
        basin: Whether they lie in one basin.
        weights: What their weights say; None where they could not be aligned.
        layers: How similar their layers are.
        naive: The path between them as they are; None without data or with other sizes.
        aligned: The path after `solver` aligned them.
        solver: What aligned them for that path.
    """

    names: tuple[str, str]
    basin: Basin
    weights: WeightComparison | None
    layers: tuple[LayerSimilarity, ...]
    naive: Path | None
    aligned: Path | None
    solver: str

    def as_json(self) -> dict[str, Any]:
        """Returns the pair as plain data."""
        found = self.weights
        weights = {"cosine": found.cosine, "aligned": found.aligned, "random": found.random} if found else None
        return {
            "names": list(self.names),
            "basin": self.basin.value,
            "weights": weights and {**weights, "held": found and found.held},
            "layers": [{**vars(layer), "sizes": list(layer.sizes)} for layer in self.layers],
            "naive": self.naive and self.naive.as_json(),
            "aligned": self.aligned and {**self.aligned.as_json(), "solver": self.solver},
        }


@dataclass(frozen=True)
class Diagnosis:
    """What networks have in common, and how to fuse them.

    Attributes:
        names: The networks.
        kind: What kind of network they are; of the first where they differ.
        pairs: The first network with each of the others.
        accuracies: Of each on the data in percent; None without labels.
        is_labelled: Whether the data have targets; without, what all say together stands for them.
        disagreement: Share of the samples to which two networks have different answers; None without data.
        saw_different_things: Whether they are sure of different classes.
        samples: How many samples were looked at.
        advice: How to fuse them.
        notes: What could not be looked at, and why.

    Example:
        >>> import copy
        >>> import torch
        >>> from torch import nn
        >>> from mergeot_diagnose import diagnose
        >>> net = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        >>> tuned = copy.deepcopy(net)
        >>> tuned[0].weight.data += 0.01
        >>> found = diagnose([net, tuned], example_inputs=torch.randn(2, 4))
        >>> found.pairs[0].basin.value, found.advice.solver
        ('one basin', 'average')
    """

    names: tuple[str, ...]
    kind: NetworkKind
    pairs: tuple[PairDiagnosis, ...]
    accuracies: tuple[float, ...] | None
    is_labelled: bool
    disagreement: float | None
    saw_different_things: bool
    samples: int
    advice: Advice
    notes: tuple[str, ...] = ()

    @property
    def expected_accuracy(self) -> tuple[float, float] | None:
        """Between what the accuracy of the fused network may be expected, in percent; None without labels."""
        if self.accuracies is None or self.advice.expected is None:
            return None
        mean = sum(self.accuracies) / len(self.accuracies)
        low, high = (min(100.0, max(0.0, mean + points)) for points in self.advice.expected)
        return low, high

    def as_json(self) -> dict[str, Any]:
        """Returns the diagnosis as plain data."""
        advice = {**vars(self.advice), "flags": self.advice.flags}
        return {
            "names": list(self.names),
            "kind": {**vars(self.kind), "words": self.kind.words},
            "pairs": [pair.as_json() for pair in self.pairs],
            "samples": self.samples,
            "is_labelled": self.is_labelled,
            "accuracies": self.accuracies,
            "disagreement": self.disagreement,
            "saw_different_things": self.saw_different_things,
            "advice": advice,
            "expected_accuracy": self.expected_accuracy,
            "notes": list(self.notes),
        }
