"""Sign symmetries: groups whose neurons may be negated, one by one, without changing the function.

An odd activation (tanh, and with it the cells of RNN, LSTM and GRU) makes a neuron and its negative interchangeable:
negate what makes it and what reads it. Which numbers that are is guessed from the places of the group and then proven
as the planted order is: random weights in float64, half of the neurons negated, the same function; and negating the
readers alone must change it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_ot.graph.blocks import Block, blocks_of, gate_dimension
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.layouts import IN, AxisLayout, Blocks, Factors, Fixed, Neurons
from mergekit_ot.graph.symmetry.proof import SENSITIVITY, Proof
from mergekit_ot.graph.symmetry.symmetry import SignPlaces

# Operations that let a sign through. A network without any has no sign symmetry worth the search; where there is one,
# the proof decides.
_ODD = ("tanh", "lstm", "gru", "asinh", "atan", "erf.", "sin.", "softsign", "hardtanh")
# More gates than any recurrent cell has: a longer fixed part of an axis is something else (positions of a flatten).
_MOST_GATES = 4


def find_signs(
    graph: ModelGraph, make: Callable[[], nn.Module], inputs: tuple[object, ...], seed: int = 0
) -> dict[str, SignPlaces]:
    """Returns the groups whose neurons may be negated, each with the numbers that change sign.

    Args:
        graph: The model's graph.
        make: Gives a fresh instance each time.
        inputs: Inputs of the shapes that the model takes.
        seed: Seed of the random weights and signs.
    """
    operations = [str(data.get("operation", "")) for _, data in graph.operations.nodes(data=True)]
    keys = [key for key in graph.free_groups if _is_eligible(graph, key)]
    if not keys or not any(odd in name for name in operations for odd in _ODD):
        return {}
    try:
        proof = Proof(make, inputs, seed)
        again = proof.again()
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError):
        # A model that cannot run on random weights in float64 keeps its signs, which loses freedom and harms nothing.
        return {}
    found = {key: _proven(graph, key, (proof, again)) for key in keys}
    return {key: places for key, places in found.items() if places is not None}


def _negated(block: Block, place: int, sign: Float[Tensor, " n"], answers: tuple[bool, ...], view: Tensor) -> Tensor:
    """Returns `view` with the neurons on one of its dimensions multiplied by their signs, where `answers` say so.

    Args:
        block: Describes the dimensions of `view`.
        place: The dimension of the group.
        sign: One per neuron.
        answers: One, or one per gate.
        view: A tensor with the dimensions of `block`.
    """
    if not any(answers):
        return view
    shape = [1] * view.ndim
    shape[place] = -1
    factor = sign.to(view).reshape(shape)
    gates = gate_dimension(block, place, answers)
    if gates is None:
        return view * factor
    shape[place], shape[gates] = 1, -1
    chosen = torch.tensor(answers, device=view.device).reshape(shape)
    return torch.where(chosen, view * factor, view)


def _proven(graph: ModelGraph, key: str, proofs: tuple[Proof, ...]) -> SignPlaces | None:
    for places in _guesses(graph, key):
        if all(_holds(graph, key, places, proof) for proof in proofs) and _can_fail(graph, key, places, proofs):
            return places
    return None


def _holds(graph: ModelGraph, key: str, places: SignPlaces, proof: Proof) -> bool:
    return proof.change(_negated_state(graph, key, places, proof)) <= proof.tolerance


def _can_fail(graph: ModelGraph, key: str, places: SignPlaces, proofs: tuple[Proof, ...]) -> bool:
    """Whether negating the readers alone changes the function: dead neurons prove nothing."""
    readers = {place: answers for place, answers in places.items() if graph.roles[*place, key] == IN}
    return any(
        not proof.change(_negated_state(graph, key, readers, proof)) <= SENSITIVITY * max(proof.noise, proof.tolerance)
        for proof in proofs
    )


def _negated_state(graph: ModelGraph, key: str, places: SignPlaces, proof: Proof) -> dict[str, Tensor]:
    size = graph.groups[key].size
    sign = torch.ones(size, dtype=torch.float64)
    sign[torch.randperm(size, generator=proof.generator)[: (size + 1) // 2]] = -1
    state = dict(proof.state)
    for name in {name for name, _ in places}:
        moved = proof.state[name].clone()
        for block in blocks_of(moved, graph.layouts[name]):
            view = block.view
            for place, dimension in enumerate(block.dimensions):
                if dimension.group == key and (name, dimension.axis) in places:
                    view = _negated(block, place, sign, places[name, dimension.axis], view)
            block.view.copy_(view)
        state[name] = moved
    for other, described in graph.aliases.items():
        if other in state and described in state:
            state[other] = state[described]
    return state


def _guesses(graph: ModelGraph, key: str) -> Iterator[SignPlaces]:
    """Yields what may change sign: all readers, and of the makers every set of gates, or all but the vectors."""
    slots = {(slot.parameter, slot.axis): slot.role for slot in graph.groups[key].members}
    gates = {place: _gates(graph.layouts[place[0]][place[1]], key) for place in slots}
    makers = [place for place, role in slots.items() if role != IN]
    readers = {place: (True,) for place in slots if place not in makers}
    count = max((gates[place] for place in makers), default=1)
    for chosen in itertools.islice(_subsets(count), 1, None):
        yield {
            **readers,
            **{place: chosen if gates[place] == count else (True,) for place in makers},
        }
    vectors = [place for place in makers if len(graph.layouts[place[0]]) == 1]
    if count == 1 and vectors and len(vectors) < len(makers):
        # A vector that scales (the gain of a norm) keeps its sign where the neuron changes it.
        yield {**readers, **{place: (place not in vectors,) for place in makers}}


def _subsets(count: int) -> Iterator[tuple[bool, ...]]:
    yield from sorted(itertools.product((False, True), repeat=count), key=sum)


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
