"""Rotations: groups whose neurons may be replaced by orthogonal combinations of them without changing the function.

A residual stream behind a norm without gains is one: every map that writes to it may be followed by a rotation, and
every map that reads it preceded by its inverse (behind a LayerNorm, by rotations that leave the mean of the neurons
where it is). So is the inner space of a head, which queries and keys, or values and the output projection, share; under
rotary positions, the planes that they turn. All of that holds in the normal form of a state (`NormalForm`) only.

Where it may hold is guessed from the places of a group, and then proven as every symmetry is.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.graph.blocks import Block
from mergekit_ot.graph.ir import ModelGraph, NeuronGroup
from mergekit_ot.graph.layouts import leaf_groups
from mergekit_ot.graph.symmetry.symmetry import AbstractProof, AbstractSymmetry, Places

# Operations that compare queries with keys; without one there are no heads whose inner space may rotate.
_SOFTMAX = ("softmax", "scaled_dot_product_attention", "multi_head_attention")
# Operations of norms along neurons, spelled out ones included; without one no stream may rotate.
_NORMS = ("layer_norm", "rms_norm", "rsqrt", "aten.sqrt", "aten.norm", "vector_norm", "aten.std", "aten.var")
# The flag of neurons that a norm stands on.
_NORMALISED = "uniform marginals only"
_MATRIX = 2


class AbstractRotation(AbstractSymmetry):
    """A symmetry whose elements are orthogonal matrices; whoever makes or reads the neurons, they act alike.

    Example:
        >>> import torch
        >>> from mergekit_ot import Block
        >>> rows = Block(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), ())
        >>> Orthogonal().act(rows, 0, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), 1).tolist()
        [[3.0, 4.0], [-1.0, -2.0]]
    """

    in_normal_form: ClassVar[bool] = True

    @abstractmethod
    def guesses(self, graph: ModelGraph, proof: AbstractProof) -> Mapping[str, Places]:
        """Returns where the symmetry may hold: group → where its elements would act."""

    def find(self, graph: ModelGraph, proof: AbstractProof) -> Mapping[str, Places]:
        """Returns the groups at which a guess is proven."""
        return proof.proven(self, graph, self.guesses(graph, proof))

    def act(
        self, block: Block, place: int, element: Float[Tensor, "size size"], power: int
    ) -> Float[Tensor, "*dimensions"]:
        """Returns the block with its neurons rotated, whoever makes or reads them."""
        rotated = torch.tensordot(element.to(block.view), block.view.movedim(place, 0), dims=1)
        return rotated.movedim(0, place)


class Orthogonal(AbstractRotation):
    """Neurons may be rotated at will: streams behind a root-mean-square norm, the inner spaces of heads.

    Example:
        >>> import torch
        >>> from mergekit_ot import Block
        >>> element = Orthogonal().draw(4, torch.Generator().manual_seed(0))
        >>> torch.allclose(element @ element.T, torch.eye(4).double())
        True
    """

    name: ClassVar[str] = "orthogonal"

    def guesses(self, graph: ModelGraph, proof: AbstractProof) -> Mapping[str, Places]:
        """Returns the streams behind norms, and the families inside heads."""
        return {**_streams(graph, proof), **inner_spaces(graph)}

    def find(self, graph: ModelGraph, proof: AbstractProof) -> Mapping[str, Places]:
        """Returns the groups at which a guess is proven, those of attention with a single head included."""
        found = super().find(graph, proof)
        return {**found, **proof.proven(self, graph, _lone_spaces(graph, {*found, *proof.normal_form.neutral}))}

    def draw(self, size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
        """Returns a random orthogonal matrix."""
        return random_rotation(size, generator)


class OrthogonalWithFixedMean(AbstractRotation):
    """Neurons may be rotated as long as their mean stays: streams behind a LayerNorm.

    Example:
        >>> import torch
        >>> element = OrthogonalWithFixedMean().draw(4, torch.Generator().manual_seed(0))
        >>> torch.allclose(element.sum(0), torch.ones(4).double())
        True
    """

    name: ClassVar[str] = "orthogonal with fixed mean"

    def guesses(self, graph: ModelGraph, proof: AbstractProof) -> Mapping[str, Places]:
        """Returns the streams that only LayerNorms read."""
        return {key: places for key, places in _streams(graph, proof).items() if key in proof.normal_form.centred}

    def draw(self, size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
        """Returns a random orthogonal matrix that leaves the vector of ones where it is."""
        columns = torch.randn(size, size, generator=generator, dtype=torch.float64)
        columns[:, 0] = 1
        basis = torch.linalg.qr(columns).Q
        inner = torch.eye(size, dtype=torch.float64)
        if size > 1:
            inner[1:, 1:] = random_rotation(size - 1, generator)
        return basis @ inner @ basis.T


class RotaryPlanes(AbstractRotation):
    """Queries and keys may be turned in the planes in which positions turn them: neuron i with neuron i + n/2.

    A plane allows a complex number in all: beside the angle a scale, of queries by r and of keys by 1/r. It is left
    out: with it, elements would no longer be their own duals.

    Example:
        >>> import torch
        >>> element = RotaryPlanes().draw(4, torch.Generator().manual_seed(0))
        >>> (element != 0).int().tolist()
        [[1, 0, 1, 0], [0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 0, 1]]
    """

    name: ClassVar[str] = "rotary"

    def guesses(self, graph: ModelGraph, proof: AbstractProof) -> Mapping[str, Places]:
        """Returns the pinned groups of halves (`with_rotary_groups`)."""
        pinned = {group.key: group for group in graph.pinned_groups.values() if group.size % 2 == 0}
        return {key: _everywhere(group) for key, group in pinned.items() if _is_named(graph, group)}

    def draw(self, size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
        """Returns a random rotation of each plane."""
        angles = torch.rand(size // 2, generator=generator, dtype=torch.float64) * 2 * torch.pi
        cosine, sine = torch.diag(angles.cos()), torch.diag(angles.sin())
        return torch.cat([torch.cat([cosine, -sine], 1), torch.cat([sine, cosine], 1)])


def random_rotation(size: int, generator: torch.Generator) -> Float[Tensor, "size size"]:
    """Returns a random orthogonal matrix, in double precision; of one neuron, its negation.

    Example:
        >>> random_rotation(1, torch.Generator().manual_seed(0)).tolist()
        [[-1.0]]
    """
    if size == 1:
        return -torch.ones(1, 1, dtype=torch.float64)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def _streams(graph: ModelGraph, proof: AbstractProof) -> dict[str, Places]:
    """Returns the groups on which norms stand whose gains a normal form makes one, with all other numbers on them."""
    if not _has_any(graph, _NORMS):
        return {}
    found = {}
    for key, neutral in proof.normal_form.neutral.items():
        group = graph.groups.get(key)
        if group is not None and group.is_free and not group.context and not _holds_buffers(graph, group):
            found[key] = {place: (int(place[0] not in neutral),) for place in group.places}
    return found


def inner_spaces(graph: ModelGraph) -> dict[str, Places]:
    """Returns the families of networks that compare queries with keys."""
    if not _has_any(graph, _SOFTMAX):
        return {}
    families = {key: group for key, group in graph.free_groups.items() if group.context}
    # A family that indexes another is no inner space but a further level of heads.
    outer = {key for group in graph.free_groups.values() for key in group.context}
    return {
        key: _everywhere(group)
        for key, group in families.items()
        if key not in outer and not _holds_buffers(graph, group)
    }


def _lone_spaces(graph: ModelGraph, known: Collection[str]) -> dict[str, Places]:
    """Returns what may be the inner space of a single head: where queries meet keys, nothing reads a group of theirs.

    Args:
        graph: The model's graph.
        known: Groups that are something else.
    """
    plain = {key: group for key, group in graph.free_groups.items() if not group.context and key not in known}
    turned = [group for group in graph.pinned_groups.values() if not group.context and _is_named(graph, group)]
    is_met = any(not any(slot.is_reader for slot in group.members) for group in (*plain.values(), *turned))
    if not is_met or not _has_any(graph, _SOFTMAX):
        return {}
    outer = {key for group in graph.groups.values() for key in group.context}
    return {
        key: _everywhere(group) for key, group in plain.items() if key not in outer and not _holds_buffers(graph, group)
    }


def may_rotate(graph: ModelGraph) -> bool:
    """Whether a network has operations without which nothing in it may rotate: norms along neurons, or attention."""
    return _has_any(graph, (*_NORMS, *_SOFTMAX))


def has_streams_or_heads(graph: ModelGraph) -> bool:
    """Whether a network looks as if streams behind norms, or inner spaces of heads, could rotate; nothing is proven.

    Example:
        >>> from torch import nn
        >>> from mergekit_ot import trace_model
        >>> has_streams_or_heads(trace_model(nn.TransformerEncoderLayer(8, 2, 16), torch.randn(2, 3, 8)))
        True
        >>> has_streams_or_heads(trace_model(nn.Sequential(nn.Linear(8, 4), nn.LayerNorm(4)), torch.randn(2, 8)))
        False
    """
    # Flags first: the operations of a kept trace are a graph that takes time to import.
    if not any(group.context or _NORMALISED in group.flags for group in graph.free_groups.values()):
        return False
    if not may_rotate(graph):
        return False
    has_heads = any(_are_linear(graph, graph.groups[key], kernels=0) for key in inner_spaces(graph))
    return has_heads or any(_looks_like_stream(graph, group) for group in graph.free_groups.values())


def _looks_like_stream(graph: ModelGraph, group: NeuronGroup) -> bool:
    """Whether a norm stands on neurons that several linear maps add to, none of which reads them, too."""
    if _NORMALISED not in group.flags or group.context or not _are_linear(graph, group, kernels=1):
        return False
    owners = {slot.parameter for slot in group.members if not slot.is_reader}
    return sum(len(graph.layouts[name]) == _MATRIX for name in owners) > 1


def _are_linear(graph: ModelGraph, group: NeuronGroup, kernels: int) -> bool:
    """Whether linear maps make and read neurons: no tensor does both, and so many convolutions (of patches) at most."""
    held = dict.fromkeys(slot.parameter for slot in group.members)
    axes = {name: {slot.axis for slot in group.members if slot.parameter == name} for name in held}
    count = sum(len(graph.layouts[name]) > _MATRIX + 1 for name in held)
    return count <= kernels and all(len(found) == 1 for found in axes.values())


def _has_any(graph: ModelGraph, names: Sequence[str]) -> bool:
    operations = [str(data.get("operation", "")) for _, data in graph.operations.nodes(data=True)]
    return any(name in operation for operation in operations for name in names)


def _holds_buffers(graph: ModelGraph, group: NeuronGroup) -> bool:
    return any(slot.parameter in graph.buffers for slot in group.members)


def _everywhere(group: NeuronGroup) -> Places:
    return dict.fromkeys(group.places, (1,))


def _is_named(graph: ModelGraph, group: NeuronGroup) -> bool:
    """Whether a pinned group has its name in the layouts, so that something can be done to it."""
    return all(group.key in leaf_groups(graph.layouts[slot.parameter][slot.axis]) for slot in group.members)
