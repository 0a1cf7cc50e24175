"""The specification of the axis algebra: what always holds, and what it does case by case.

On random programs of movements what it calls free must be free; after random operations its invariants must hold; and
each thing that it does is shown on the smallest labels that show it.
"""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mergekit_ot import check_model
from mergekit_ot.graph.axes.algebra import AxisAlgebra
from mergekit_ot.graph.axes.expressions import (
    Atom,
    Case,
    Concat,
    Expression,
    Product,
    Replicated,
    atoms_of,
    pieces,
    resolve,
    size_of,
)
from mergekit_ot.graph.axes.occurrences import is_visible, occurrences

MOVES = (
    "heads",
    "swap",
    "merge",
    "halves",
    "shuffle",
    "stack",
    "add_bias",
    "pad",
    "gate",
    "mean_heads",
    "slice",
    "tie",
)


class Moved(nn.Module):
    """A linear map, a random program of movements and elementwise operations, and a linear map again."""

    def __init__(self, program: list[str]) -> None:
        super().__init__()
        self.program = program
        self.first = nn.Linear(3, 12)
        self.inner = nn.ModuleList(nn.Linear(12, 12) for _ in program)
        self.biases = nn.ParameterList(nn.Parameter(torch.randn(12)) for _ in program)
        self.last = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for move, inner, bias in zip(self.program, self.inner, self.biases, strict=True):
            x = self.step(move, torch.relu(x), inner, bias)
        return self.last(x)

    def step(self, move: str, x: Tensor, inner: nn.Module, bias: Tensor) -> Tensor:
        batch = x.shape[0]
        if move == "heads":
            return inner(x).view(batch, 3, 4).permute(0, 2, 1).permute(0, 2, 1).reshape(batch, 12)
        if move == "swap":
            return x.view(batch, 3, 4).transpose(1, 2).reshape(batch, 12)
        if move == "merge":
            return inner(x.unflatten(1, (2, 6)).flatten(1))
        if move == "halves":
            one, other = x.chunk(2, 1)
            return torch.cat([other, torch.tanh(one)], 1)
        if move == "shuffle":
            return x.view(batch, 2, 6).transpose(1, 2).reshape(batch, 12)
        if move == "stack":
            return torch.stack([x[:, :6], x[:, 6:]], 1).sum(1).repeat_interleave(2, 1)
        if move == "add_bias":
            return x + bias
        if move == "pad":
            return torch.nn.functional.pad(x[:, 2:10], (2, 2)) + inner(x)
        if move == "gate":
            one, other = inner(x).view(batch, 2, 6).unbind(1)
            return torch.cat([one * torch.sigmoid(other), one], 1)
        if move == "mean_heads":
            return inner(x).view(batch, 4, 3).mean(1, keepdim=True).expand(batch, 4, 3).reshape(batch, 12) + x
        if move == "slice":
            return torch.cat([x[:, 5:], x[:, :5]], 1)
        return x * inner(x)


def law(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


PROGRAMS = st.lists(st.sampled_from(MOVES), min_size=1, max_size=4)


@law(8)
@given(PROGRAMS)
def test_no_random_program_of_movements_breaks_the_function(program: list[str]) -> None:
    stays(program)


@pytest.mark.slow
@law(25)
@given(PROGRAMS)
def test_no_further_program_of_movements_breaks_the_function(program: list[str]) -> None:
    stays(program)


def stays(program: list[str]) -> None:
    report = check_model(lambda: Moved(program), torch.randn(2, 3), trials=1)
    assert report.culprits == ()
    assert report.preserved in (True, None)


@pytest.mark.parametrize(
    ("program", "groups"),
    [(["add_bias"], 1), (["tie"], 1), (["halves"], 2), (["gate"], 2), (["heads"], 3)],
)
def test_freedom_counted_by_hand_is_found(program: list[str], groups: int) -> None:
    assert check_model(lambda: Moved(program), torch.randn(2, 3), trials=1).groups == groups


def algebra_with(*sizes: int) -> tuple[AxisAlgebra, list[Atom]]:
    algebra = AxisAlgebra()
    return algebra, [algebra.atom(size) for size in sizes]


FACTORS = ([3, 4], [4, 3], [2, 6], [6, 2], [2, 2, 3])
BLOCKS = ([6, 6], [5, 7], [4, 8], [3, 3, 6])
OPERATIONS = st.tuples(
    st.sampled_from(("split", "cut", "unify", "pin", "stack", "settle")), st.integers(0, 7), st.integers(0, 7)
)


class Labels:
    """Axes of twelve neurons, parameters of a random sequence of operations, and every atom that was ever seen."""

    def __init__(self) -> None:
        self.algebra = AxisAlgebra()
        first, second = self.algebra.atom(12), self.algebra.atom(12)
        self.axes: list[Expression] = [first, second, Replicated(12)]
        # Like a parameter's axes: each is free, and possibly a family over those before it.
        self.axes.append(self.algebra.atom(12, context={first}))
        self.axes.append(self.algebra.atom(12, context={first, second}))
        self.seen: set[Atom] = set()
        self.pinned: set[Atom] = set()

    def apply(self, operation: str, place: int, other: int) -> None:
        axis, beside = self.axes[place % len(self.axes)], self.axes[other % len(self.axes)]
        if operation == "split":
            self.algebra.split_product(axis, FACTORS[other % len(FACTORS)])
        elif operation == "cut":
            self.algebra.cut([axis, beside], 0, BLOCKS[other % len(BLOCKS)])
        elif operation == "unify":
            self.algebra.unify(axis, beside)
        elif operation == "pin":
            self.algebra.pin(axis, "because")
        elif operation == "stack":
            labels = self.algebra.concat([[axis, beside], [beside, axis]], 0)
            self.axes += [label for label in labels if size_of(label) == 12]
        self.algebra.settle(self.tensors())

    def tensors(self) -> list[list[Expression]]:
        return [[axis] for axis in self.axes] + [self.axes[:2]]

    def note(self) -> None:
        for axis in self.axes:
            self.seen |= atoms_of(axis)
        self.pinned |= {atom for atom in self.seen if atom.pin is not None}


def is_normal(expression: Expression) -> bool:
    inner = pieces(expression)
    if isinstance(expression, Product):
        plain = [not isinstance(piece, Product) and piece != Replicated(1) for piece in inner]
        return len(inner) > 1 and all(plain) and all(map(is_normal, inner))
    if isinstance(expression, Case):
        return any(option != inner[0] for option in inner) and all(map(is_normal, inner))
    return (not isinstance(expression, Concat) or len(inner) > 1) and all(map(is_normal, inner))


def sees_its_context(labels: Sequence[Expression]) -> bool:
    places = occurrences(labels)
    return all(
        is_visible([place for place in places if place.atom is outer], family)
        for family in places
        for outer in (family.atom.context if family.atom is not None else ())
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.lists(OPERATIONS, min_size=1, max_size=8))
def test_what_always_holds_holds_after_random_operations(operations: list[tuple[str, int, int]]) -> None:
    labels = Labels()
    for operation in operations:
        labels.note()
        labels.apply(*operation)
        assert all(size_of(axis) == 12 for axis in labels.axes)
        assert all(is_normal(resolve(axis)) for axis in labels.axes)
        assert all(resolve(resolve(axis)) == resolve(axis) for axis in labels.axes)
        assert all(sees_its_context(tensor) for tensor in labels.tensors())
        for before in labels.pinned:
            assert all(atom.pin is not None for atom in atoms_of(before))
        for atom in set().union(*map(atoms_of, labels.axes)):
            assert atom.link is None
            assert atom.pin is None or not atom.context
            assert all(outer.link is None and outer.size > 1 and outer is not atom for outer in atom.context)


def test_splitting_makes_the_inner_factor_a_family() -> None:
    algebra, (atom,) = algebra_with(12)
    outer, inner = algebra.split_product(atom, [3, 4]) or []
    assert isinstance(outer, Atom)
    assert isinstance(inner, Atom)
    assert inner.context == {outer}
    assert resolve(atom) == Product((outer, inner))


def test_products_meet_at_their_common_refinement() -> None:
    algebra, (one, other) = algebra_with(12, 12)
    algebra.split_product(one, [2, 6])
    algebra.split_product(other, [4, 3])
    algebra.unify(one, other)
    algebra.settle([[one], [other]])
    assert [size_of(part) for part in resolve(one).factors] == [2, 2, 3]  # type: ignore[union-attr]
    assert resolve(one) == resolve(other)


def test_products_without_common_refinement_are_pinned() -> None:
    algebra, (one, other) = algebra_with(12, 12)
    algebra.split_product(one, [3, 4])
    algebra.split_product(other, [4, 3])
    algebra.unify(one, other)
    assert all(atom.pin is not None for atom in atoms_of(one) | atoms_of(other))


def test_cutting_an_outer_axis_turns_its_families_into_cases() -> None:
    algebra, (atom,) = algebra_with(12)
    outer, inner = algebra.split_product(atom, [3, 4]) or []
    blocks = algebra.cut([outer, inner], 0, [1, 2])
    assert isinstance(resolve(inner), Case)
    assert blocks is not None
    assert blocks[0][1] is not blocks[1][1]


def test_a_family_is_tied_where_its_context_is_not_visible() -> None:
    algebra, (atom,) = algebra_with(12)
    outer, inner = algebra.split_product(atom, [3, 4]) or []
    assert isinstance(inner, Atom)
    algebra.settle([[outer, inner]])
    assert inner.context == {outer}
    algebra.settle([[inner]])
    assert inner.context == set()


def test_constant_axes_constrain_nothing_and_take_the_label_of_what_varies() -> None:
    algebra, (atom,) = algebra_with(6)
    assert algebra.unify(Replicated(6), atom) is atom
    assert atom.pin is None
    padded = algebra.concat([[Replicated(2)], [algebra.atom(2)], [Replicated(2)]], 0)[0]
    assert isinstance(padded, Concat)
    common = algebra.unify(padded, atom)
    assert not any(isinstance(part, Replicated) for part in common.blocks)  # type: ignore[union-attr]


def test_a_pin_reaches_everything_that_is_unified_with_it() -> None:
    algebra, (one, other) = algebra_with(4, 4)
    algebra.pin(one, "because")
    algebra.unify(other, one)
    assert str(resolve(other).pin) == "because"  # type: ignore[union-attr]


@pytest.mark.parametrize("is_older", [True, False])
@pytest.mark.parametrize("is_first", [True, False])
def test_unified_families_keep_only_the_context_that_they_share(is_older: bool, is_first: bool) -> None:
    algebra, (atom, plain) = algebra_with(12, 4)
    outer, inner = algebra.split_product(atom, [3, 4]) or []
    if not is_older:
        # Which of two unified atoms stands for both depends on their age.
        plain = algebra.atom(4)
    algebra.unify(*((inner, plain) if is_first else (plain, inner)))
    algebra.settle([])
    common = resolve(inner)
    assert isinstance(common, Atom)
    assert common is resolve(plain)
    assert common.context == set()
    assert isinstance(outer, Atom)
    assert outer.pin is None


def test_families_over_the_same_context_stay_families_when_unified() -> None:
    algebra, (one, other) = algebra_with(12, 12)
    outer, inner = algebra.split_product(one, [3, 4]) or []
    algebra.split_product(other, [3, 4])
    algebra.unify(one, other)
    algebra.settle([[one], [other]])
    common = resolve(inner)
    assert isinstance(common, Atom)
    assert common.context == {resolve(outer)}


def test_a_family_is_tied_where_its_context_is_visible_twice_on_other_axes() -> None:
    algebra, (atom,) = algebra_with(12)
    outer, inner = algebra.split_product(atom, [3, 4]) or []
    assert isinstance(inner, Atom)
    # On two axes of three heads each: which of them says whose neurons these are?
    algebra.settle([[outer, outer, inner]])
    assert inner.context == set()


def test_of_two_places_of_its_context_a_family_sees_the_one_on_its_own_axis() -> None:
    algebra, (atom,) = algebra_with(12)
    outer, inner = algebra.split_product(atom, [3, 4]) or []
    assert isinstance(inner, Atom)
    algebra.settle([[atom, atom]])
    assert inner.context == {outer}


def test_a_family_follows_its_context_into_the_atom_that_stands_for_it() -> None:
    algebra, (older, younger) = algebra_with(3, 3)
    family = algebra.atom(4, context={younger})
    algebra.unify(older, younger)
    assert family.context == {older}
    algebra.cut([older, family], 0, [1, 2])
    assert isinstance(resolve(family), Case)
