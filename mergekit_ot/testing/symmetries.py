"""The contract of symmetries, clause by clause, on a model that has one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from mergekit_ot.api import trace_model
from mergekit_ot.graph.blocks import Block, Dimension
from mergekit_ot.graph.capture.inputs import traced_inputs
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.layouts import leaf_groups
from mergekit_ot.graph.symmetry.check import Runs, judge
from mergekit_ot.graph.symmetry.planted import PlantedProof
from mergekit_ot.graph.symmetry.proof import Proof
from mergekit_ot.graph.symmetry.rotary import with_rotary_groups
from mergekit_ot.graph.symmetry.symmetry import AbstractSymmetry, Places
from mergekit_ot.hooks.manager import PluginManager, default_manager
from mergekit_ot.testing.clauses import Contract, raised_by

_TOLERANCE = 1e-10
# Of the blocks on which an element is tried: whatever a network's are, a symmetry acts along one dimension.
_NEURONS = 6


def check_symmetry(
    symmetry: AbstractSymmetry | str,
    make: Callable[[], nn.Module],
    example_inputs: Tensor | tuple[object, ...],
    *,
    groups: int | None = None,
    manager: PluginManager | None = None,
    seed: int = 0,
) -> Mapping[str, Places]:
    """Checks a symmetry against its contract on a model that has it.

    The clauses: the same seed draws the same element; an element gives numbers of the same shape and type, and leaves
    the view as it was; it is not the identity; what reads neurons undoes what is done to them; elements act
    where free groups stand, with powers of 1, -1 or 0; as many groups are found as should be; at all of them
    together, and at other shapes of the input, random elements keep the function, and at one place of a group alone
    they change it.

    Args:
        symmetry: The symmetry, or the name of a registered one.
        make: Gives a fresh instance each time; it must never have been run.
        example_inputs: Inputs of the shapes the model takes.
        groups: Groups expected, counted by hand; 0 where the model is not to have it. Where left out, there must be
            one.
        manager: The plugins to use; the installed ones by default.
        seed: Seed of the random weights, inputs and elements.

    Returns:
        The groups that have it, each with the numbers on which its elements act.

    Raises:
        PluginError: A clause is broken; the message says which, and where.
        ArchitectureError: The model cannot be traced.

    Example:
        >>> net = lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> list(check_symmetry("sign", net, torch.randn(2, 4), groups=1))
        ['0.weight:0']
    """
    manager = manager if manager is not None else default_manager()
    checked = manager.get("symmetry", symmetry)() if isinstance(symmetry, str) else symmetry
    model = make()
    graph = with_rotary_groups(trace_model(model, example_inputs, manager))
    inputs = traced_inputs(model, example_inputs)
    case = _Case(checked, graph, make, inputs, seed, groups)
    advice = "How symmetries are written: see 'mergeot docs symmetries'."
    contract = Contract(f"The symmetry '{checked.name}'", advice, blame=raised_by("the symmetry"))
    for clause in _CLAUSES:
        contract.check(clause, case)
    return case.found


@dataclass(frozen=True)
class _Case:
    """A symmetry, and the model on which it is checked."""

    symmetry: AbstractSymmetry
    graph: ModelGraph
    make: Callable[[], nn.Module]
    inputs: tuple[object, ...]
    seed: int
    groups: int | None

    @cached_property
    def proof(self) -> PlantedProof:
        """What the symmetry may ask."""
        return PlantedProof(self.make, self.inputs, self.seed, self.graph)

    @cached_property
    def found(self) -> Mapping[str, Places]:
        """What the symmetry finds by itself, whether it asked for a proof or not."""
        return self.symmetry.find(self.graph, self.proof)

    def may_act_on(self, key: str) -> bool:
        """Whether a group is free, or is pinned and has its name wherever it stands (planes of rotary positions)."""
        if key in self.graph.free_groups or key not in self.graph.groups:
            return key in self.graph.free_groups
        slots = self.graph.groups[key].members
        return all(key in leaf_groups(self.graph.layouts[slot.parameter][slot.axis]) for slot in slots)

    def draw(self, seed: int) -> Tensor:
        """Returns an element."""
        return self.symmetry.draw(_NEURONS, torch.Generator().manual_seed(seed))

    def block(self, seed: int) -> Block:
        """Returns random numbers with neurons on their second dimension."""
        generator = torch.Generator().manual_seed(seed)
        dimensions = (Dimension(None, 3, 0), Dimension("neurons", _NEURONS, 1), Dimension(None, 2, 2))
        return Block(torch.randn(3, _NEURONS, 2, generator=generator, dtype=torch.float64), dimensions)


def _is_drawn_from_its_seed(case: _Case) -> str:
    """The same seed draws the same element."""
    first, second = case.draw(case.seed), case.draw(case.seed)
    return "" if torch.equal(first, second) else f"one seed drew {first.tolist()} and {second.tolist()}"


def _does_something(case: _Case) -> str:
    """An element that is drawn is not the identity."""
    block, element = case.block(1), case.draw(case.seed)
    moved = case.symmetry.act(block, 1, element, 1)
    return "" if not torch.equal(moved, block.view) else f"the element {element.tolist()} changed nothing"


def _gives_numbers_of_the_same_kind(case: _Case) -> str:
    """An element gives numbers of the same shape and type, and leaves the view as it was."""
    for power in (1, -1):
        block = case.block(1)
        before = block.view.clone()
        moved = case.symmetry.act(block, 1, case.draw(case.seed), power)
        if not torch.equal(before, block.view):
            return f"at power {power} it wrote into the block that it was given"
        if (moved.shape, moved.dtype) != (before.shape, before.dtype):
            made_of = f"{moved.dtype} {tuple(moved.shape)} of {before.dtype} {tuple(before.shape)}"
            return f"at power {power} it made {made_of}"
    return ""


def _is_undone_by_readers(case: _Case) -> str:
    """The sum over the neurons of numbers at power 1 times numbers at power -1 stays."""
    makers, readers, element = case.block(1), case.block(2), case.draw(case.seed)
    moved = torch.einsum(
        "ani,bnj->abij", case.symmetry.act(makers, 1, element, 1), case.symmetry.act(readers, 1, element, -1)
    )
    expected = torch.einsum("ani,bnj->abij", makers.view, readers.view)
    error = float((moved - expected).abs().max())
    return "" if error <= _TOLERANCE * float(expected.abs().max()) else f"it changed by {error:.2g}"


def _acts_where_groups_stand(case: _Case) -> str:
    """Elements act on axes of parameters on which a free group stands, with powers of 1, -1 or 0."""
    for key, places in case.found.items():
        if not case.may_act_on(key):
            return f"'{key}' is no free group"
        strange = set(places) - set(case.graph.groups[key].places)
        if strange:
            return f"group '{key}' does not stand on {sorted(strange)}"
        wrong = [place for place, powers in places.items() if not powers or not set(powers) <= {-1, 0, 1}]
        if wrong:
            return f"the powers of group '{key}' on {wrong[0]} are {places[wrong[0]]}"
    return ""


def _is_found(case: _Case) -> str:
    """As many groups are found as should be."""
    keys = list(case.found)
    if case.groups is None:
        return "" if keys else "none was found; say groups=0 where that is right"
    listing = ", ".join(keys) or "none"
    return "" if len(keys) == case.groups else f"{len(keys)} were found ({listing}), not {case.groups}"


def _holds(case: _Case) -> str:
    """Random elements keep the function, and at one place of a group alone they change it."""
    first = Proof(case.make, case.inputs, case.seed)
    draws = [first, *first.at_other_shapes()]
    places, runs = case.found, Runs(draws)
    if case.symmetry.in_normal_form and places:
        runs = runs.rewritten(case.proof.normal_form)
    verdict = judge(case.symmetry, case.graph, places, runs, trials=2)
    if verdict.culprits:
        return f"the function changed with elements at {', '.join(verdict.culprits)}"
    dead = [key for key in places if key not in verdict.certified]
    return "" if not dead else f"nothing in this model proves {', '.join(dead)}"


_CLAUSES = (
    _is_drawn_from_its_seed,
    _gives_numbers_of_the_same_kind,
    _does_something,
    _is_undone_by_readers,
    _acts_where_groups_stand,
    _is_found,
    _holds,
)
