"""Sign symmetries: groups whose neurons may be negated, one by one, without changing the function.

An odd activation (tanh, and with it the cells of RNN, LSTM and GRU) makes a neuron and its negative interchangeable:
negate what makes it and what reads it. Which numbers that are is guessed from the places of the group and then proven
as the planted order is: random weights in float64, half of the neurons negated, the same function; and negating the
readers alone must change it.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.graph.blocks import Block, spread_along
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.layouts import AxisLayout, Blocks, Factors, Fixed, Neurons
from mergekit_ot.graph.symmetry.operands import operands
from mergekit_ot.graph.symmetry.symmetry import AbstractProof, AbstractSymmetry, Places

# Operations that let a sign through, products and norms included. A network without any has no sign symmetry worth the
# search; where there is one, the proof decides.
_ODD = ("tanh", "lstm", "gru", "asinh", "atan", "erf.", "sin.", "softsign", "hardtanh", "aten.mul.Tensor", "rms_norm")
# Functions that treat a number and its negative apart, and operations that may stand before them.
_ONE_SIDED = (
    "relu",
    "gelu",
    "silu",
    "sigmoid",
    "hardswish",
    "hardsigmoid",
    "elu",
    "leaky_relu",
    "softplus",
    "mish",
    "exp",
)
_PASSED = (
    "batch_norm",
    "native_batch_norm",
    "_native_batch_norm",
    "view",
    "reshape",
    "flatten",
    "transpose",
    "permute",
)
# More gates than any recurrent cell has: a longer fixed part of an axis is something else (positions of a flatten).
_MOST_GATES = 4
# Parameter → its name among the operations.
Nodes = Mapping[str, str]
# Neurons that are products are made by two maps, and change sign with one of them.
_FACTORS = 2


class Sign(AbstractSymmetry):
    """The neurons of a group may be negated, one by one; an element is one sign per neuron.

    Example:
        >>> import torch
        >>> from mergekit_ot import Block
        >>> sorted(Sign().draw(4, torch.Generator().manual_seed(0)).tolist())
        [-1.0, -1.0, 1.0, 1.0]
        >>> rows = Block(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), ())
        >>> Sign().act(rows, 0, torch.tensor([1.0, -1.0]), 1).tolist()
        [[1.0, 2.0], [-3.0, -4.0]]
    """

    name: ClassVar[str] = "sign"

    def find(self, graph: ModelGraph, proof: AbstractProof) -> Mapping[str, Places]:
        """Returns the groups whose neurons may be negated, each with the numbers that change sign."""
        operations = [str(data.get("operation", "")) for _, data in graph.operations.nodes(data=True)]
        if not any(name in operation for operation in operations for name in _ODD):
            return {}
        proven, nodes = {}, operands(graph, graph.layouts)
        for key in graph.free_groups:
            is_worth_it = _is_eligible(graph, key) and not _is_one_sided(graph, key, nodes)
            guesses = _guesses(graph, key, nodes) if is_worth_it else iter(())
            places = next((guess for guess in guesses if proof.is_proven(self, graph, key, guess)), None)
            if places is not None:
                proven[key] = places
        return proven

    def draw(self, size: int, generator: torch.Generator) -> Float[Tensor, " size"]:
        """Returns signs of which half, rounded up, are negative."""
        sign = torch.ones(size, dtype=torch.float64)
        sign[torch.randperm(size, generator=generator)[: (size + 1) // 2]] = -1
        return sign

    def act(
        self, block: Block, place: int, element: Float[Tensor, " size"], power: int
    ) -> Float[Tensor, "*dimensions"]:
        """Returns the block with its neurons times their signs, whoever makes or reads them."""
        return block.view * spread_along(element.to(block.view), place, block.view.ndim)


def _guesses(graph: ModelGraph, key: str, nodes: Nodes) -> Iterator[Places]:
    """Yields what may change sign: all readers, and of the makers every set of gates, some vectors, or one of two."""
    slots = graph.groups[key].places
    readers = {place: (1,) for place, slot in slots.items() if slot.is_reader}
    makers = {place: _gates(graph.layouts[place[0]][place[1]], key) for place in slots if place not in readers}
    count = max(makers.values(), default=1)
    for chosen in itertools.islice(_subsets(count), 1, None):
        yield readers | {place: chosen if gates == count else (1,) for place, gates in makers.items()}
    if count == 1:
        yield from ({**readers, **guess} for guess in _partial_guesses(graph, list(makers), nodes))


def _partial_guesses(graph: ModelGraph, makers: Sequence[tuple[str, int]], nodes: Nodes) -> Iterator[Places]:
    """Yields sets of makers that leave out some: vectors, the gains of norms, or all but one of two factors."""
    vectors = {name for name, _ in makers if len(graph.layouts[name]) == 1}
    matrices = {name for name, _ in makers} - vectors
    gains = {name for name in vectors if _is_gain(graph, name, nodes)}
    left_out = [vectors, gains]
    if len(matrices) == _FACTORS:
        # The gate of a product keeps its sign, with what is added to it.
        beside = {name: {name, *_added_to(graph, name, nodes)} for name in matrices}
        left_out += [beside[name] | gains for name in sorted(matrices)]
    tried: list[Collection[str]] = [set()]
    for names in left_out:
        if names not in tried and not names.issuperset(name for name, _ in makers):
            tried.append(names)
            yield {place: (int(place[0] not in names),) for place in makers}


def _is_gain(graph: ModelGraph, name: str, nodes: Nodes) -> bool:
    """Whether a vector multiplies: in a product, or as the first of the two vectors of a norm."""
    node, placed = nodes.get(name), set(nodes.values())
    for user in () if node is None else graph.operations.successors(node):
        operation = str(graph.operations.nodes[user].get("operation", ""))
        first = [each for each in graph.operations.predecessors(user) if each in placed][:1]
        if "aten.mul" in operation or ("norm" in operation and first == [node]):
            return True
    return False


def _added_to(graph: ModelGraph, name: str, nodes: Nodes) -> set[str]:
    """Returns the vectors that an operation reads together with a matrix: its bias."""
    node, operations = nodes.get(name), graph.operations
    if node is None:
        return set()
    beside = {each for user in operations.successors(node) for each in operations.predecessors(user)}
    return {each for each in graph.layouts if len(graph.layouts[each]) == 1 and nodes.get(each) in beside}


def _is_one_sided(graph: ModelGraph, key: str, nodes: Nodes) -> bool:
    """Whether every map that makes the neurons goes straight into a function that treats signs apart, such as ReLU.

    The proof would refuse such a group after runs of the model, of which a deep network would need hundreds.
    """
    slots = graph.groups[key].places
    makers = [name for (name, axis), slot in slots.items() if not slot.is_reader and len(graph.layouts[name]) > 1]
    return bool(makers) and all(_goes_into_one_sided(graph, nodes.get(name)) for name in makers)


def _goes_into_one_sided(graph: ModelGraph, node: str | None) -> bool:
    if node is None:
        return False
    operations, waiting = graph.operations, [node]
    seen = set(waiting)
    is_first, met = True, False
    while waiting:
        for user in operations.successors(waiting.pop()):
            operation = str(operations.nodes[user].get("operation", ""))
            if "hardtanh" not in operation and any(operation.startswith(f"aten.{each}") for each in _ONE_SIDED):
                met = True
            elif is_first or any(operation.startswith(f"aten.{each}") for each in _PASSED):
                waiting += [user] * (user not in seen)
                seen.add(user)
            else:
                return False
        is_first = False
    return met


def _subsets(count: int) -> Iterator[tuple[int, ...]]:
    yield from sorted(itertools.product((0, 1), repeat=count), key=sum)


def _is_eligible(graph: ModelGraph, key: str) -> bool:
    group = graph.groups[key]
    if group.context or any(key in other.context for other in graph.free_groups.values()):
        return False
    if any(slot.parameter in graph.buffers for slot in group.members):
        return False
    return all(_is_plain(graph.layouts[slot.parameter][slot.axis], key) for slot in group.members)


def _is_plain(layout: AxisLayout, key: str) -> bool:
    if isinstance(layout, Blocks):
        return all(isinstance(part, Neurons | Fixed) for part in layout.parts)
    if isinstance(layout, Factors):
        return all(
            isinstance(part, Fixed) or (isinstance(part, Neurons) and part.group == key) for part in layout.parts
        )
    return isinstance(layout, Neurons)


def _gates(layout: AxisLayout, key: str) -> int:
    if not isinstance(layout, Factors):
        return 1
    sizes = [part.size for part in layout.parts if isinstance(part, Fixed) and part.size > 1]
    return sizes[0] if len(sizes) == 1 and sizes[0] <= _MOST_GATES else 1
