"""What a symmetry of a neuron group is: something that may be done to its neurons without changing the function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Shaped
from torch import Tensor

from mergekit_ot.graph.blocks import Block
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.normal_form.form import NormalForm

# (parameter, axis) -> the power with which an element acts on the numbers there: 1 as it is, -1 as its dual (what
# reads neurons undoes what is done to them), 0 not at all. One power, or one per gate where the axis holds gates.
Places = Mapping[tuple[str, int], tuple[int, ...]]


class AbstractProof(ABC):
    """What a symmetry asks before it claims a group.

    Example:
        >>> import torch
        >>> from mergekit_ot import Sign, trace_model
        >>> from mergekit_ot.graph.symmetry.planted import PlantedProof
        >>> make = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> inputs = torch.randn(2, 4)
        >>> proof = PlantedProof(make, (inputs,))
        >>> makers, readers = {("0.weight", 0): (1,), ("0.bias", 0): (1,)}, {("2.weight", 1): (1,)}
        >>> graph = trace_model(make(), inputs)
        >>> proof.is_proven(Sign(), graph, "0.weight:0", {**makers, **readers})
        True
        >>> proof.is_proven(Sign(), graph, "0.weight:0", readers)
        False
    """

    @abstractmethod
    def is_proven(self, symmetry: AbstractSymmetry, graph: ModelGraph, key: str, places: Places) -> bool:
        """Whether random elements at these places keep the function, and at the readers alone change it.

        Args:
            symmetry: Whose elements act.
            graph: The model's graph.
            key: The group.
            places: Where the elements act, and with which power.
        """

    def proven(self, symmetry: AbstractSymmetry, graph: ModelGraph, guesses: Mapping[str, Places]) -> dict[str, Places]:
        """Returns the groups at which a guess is proven, of one guess per group.

        Args:
            symmetry: Whose elements act.
            graph: The model's graph.
            guesses: Group → where the elements act, and with which power.
        """
        return {key: places for key, places in guesses.items() if self.is_proven(symmetry, graph, key, places)}

    @property
    def normal_form(self) -> NormalForm:
        """The normal form of the model's states: rewritten states compute the same, with neutral gains."""
        return NormalForm()


class AbstractSymmetry(ABC):
    """Something that may be done to the neurons of a group: an order, signs, scales.

    A symmetry says where it may hold, gives random elements, and does one to a block of numbers. That it holds is
    proven by running the model: elements planted at random must keep its function. Classes are built without
    arguments and registered with the hook ``mergeot_symmetries``.

    Attributes:
        name: Name under which it is registered and reported.
        is_traced: Whether the trace itself claims it for every free group (the order of neurons), so that a group for
            which the proof refutes it is pinned. Other symmetries only hold where each group is proven.
        in_normal_form: Whether it holds for states in their normal form only.

    Example:
        All neurons of a group change sign together:

        >>> import torch
        >>> class Negation(AbstractSymmetry):
        ...     name = "negation"
        ...     def find(self, graph, proof):
        ...         groups = graph.free_groups.values()
        ...         guesses = {group.key: dict.fromkeys(group.places, (1,)) for group in groups}
        ...         return {key: guess for key, guess in guesses.items() if proof.is_proven(self, graph, key, guess)}
        ...     def draw(self, size, generator):
        ...         return -torch.ones(size)
        ...     def act(self, block, place, element, power):
        ...         return -block.view
        >>> from mergekit_ot.testing import check_symmetry
        >>> net = lambda: torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> list(check_symmetry(Negation(), net, torch.randn(2, 4)))
        ['0.weight:0']
    """

    name: ClassVar[str]
    is_traced: ClassVar[bool] = False
    in_normal_form: ClassVar[bool] = False

    @abstractmethod
    def find(self, graph: ModelGraph, proof: AbstractProof) -> Mapping[str, Places]:
        """Returns the groups that have the symmetry, each with the numbers on which an element acts.

        Args:
            graph: The model's graph.
            proof: Tells whether a guess holds. What is returned unproven is proven afterwards, or left out.
        """

    @abstractmethod
    def draw(self, size: int, generator: torch.Generator) -> Shaped[Tensor, "size ..."]:
        """Returns a random element for `size` neurons that is not the identity (where there is another).

        A family of groups gets one element per index of its context, drawn one after the other.
        """

    @abstractmethod
    def act(
        self, block: Block, place: int, element: Shaped[Tensor, "size ..."], power: int
    ) -> Shaped[Tensor, "*dimensions"]:
        """Returns `block.view` with an element done to the neurons on its dimension `place`; the view stays as it is.

        For numbers that make neurons (power 1) and numbers that read them (power -1), the sum over the neurons of
        their products must stay. Orders, signs and rotations are their own duals, and act alike at both powers.

        Args:
            block: A view of a parameter, and what its dimensions are.
            place: The dimension of the group.
            element: What `draw` gave for the group, or for one member of a family.
            power: 1, or -1 for the dual.
        """
