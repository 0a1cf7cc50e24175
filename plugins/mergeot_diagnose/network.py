"""What kind of network it is: what of its graph decides how it is best fused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mergekit_ot import ModelGraph, layout_size

_CELLS = (".lstm", ".gru", ".rnn_tanh", ".rnn_relu")
_STATISTICS = ("batch_norm", "instance_norm")
_ATTENTION = ("scaled_dot_product",)
# Attention that is written by hand.
_SCORES, _PRODUCTS = ("softmax",), (".bmm", ".matmul", ".einsum")


@dataclass(frozen=True)
class NetworkKind:
    """What of a network's graph decides how it is best fused.

    Attributes:
        has_statistics: It keeps running statistics, as BatchNorm does.
        has_attention: It has heads of attention.
        is_recurrent: It reads neurons that it made one step before.
        free_groups: How many groups of neurons have an order to choose.
        free_percent: Weights that at least one such group reaches, in percent of all.
        pins: Why the others stay in place, a sentence per reason.
    """

    has_statistics: bool
    has_attention: bool
    is_recurrent: bool
    free_groups: int
    free_percent: float
    pins: tuple[str, ...]

    @property
    def words(self) -> str:
        """The kind in words."""
        kinds = {
            "recurrent": self.is_recurrent,
            "with attention": self.has_attention,
            "with running statistics (BatchNorm)": self.has_statistics,
        }
        return ", ".join(word for word, holds in kinds.items() if holds) or "feed-forward, without running statistics"


def kind_of(graph: ModelGraph) -> NetworkKind:
    """Returns what kind of network a graph is of.

    Example:
        >>> import torch
        >>> from mergekit_ot import trace_model
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
        >>> kind_of(trace_model(net, torch.randn(2, 4))).words
        'with running statistics (BatchNorm)'
    """
    operations = [name for _, data in graph.operations.nodes(data=True) if "." in (name := str(data.get("operation")))]
    has_attention = _has(operations, _ATTENTION) or (_has(operations, _SCORES) and _has(operations, _PRODUCTS))
    weights = {name: math.prod(map(layout_size, axes)) for name, axes in graph.layouts.items()}
    weights = {name: size for name, size in weights.items() if name not in graph.buffers}
    moved = {slot.parameter for group in graph.free_groups.values() for slot in group.members}
    total = sum(weights.values())
    return NetworkKind(
        has_statistics=bool(graph.buffers) and _has(operations, _STATISTICS),
        has_attention=has_attention,
        is_recurrent=not has_attention and (_has(operations, _CELLS) or _reads_itself(graph)),
        free_groups=len(graph.free_groups),
        free_percent=100 * sum(size for name, size in weights.items() if name in moved) / total if total else 0.0,
        pins=graph.pin_sentences(),
    )


def _has(operations: Sequence[str], words: Sequence[str]) -> bool:
    return any(word in name for name in operations for word in words)


def _reads_itself(graph: ModelGraph) -> bool:
    """Whether a parameter reads the neurons that it makes, as a cell that is written by hand does."""
    return any(before == after and parameter is not None for before, after, parameter in graph.group_edges())
