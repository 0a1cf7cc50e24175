"""What axes share once they have met: pins, flags and what they are indexed by."""

from __future__ import annotations

import pytest

from mergekit_ot.graph.axes.algebra import AxisAlgebra
from mergekit_ot.graph.axes.expressions import Atom, Expression, Tag, atoms_of, pieces, resolve
from mergekit_ot.graph.axes.occurrences import Occurrence, is_visible


def test_pinned_axes_beside_a_concatenation_become_one() -> None:
    algebra = AxisAlgebra()
    places, others = algebra.pinned(3, "a position"), algebra.pinned(3, "another position")
    first, second = algebra.atom(4, context={places}), algebra.atom(5, context={others})
    tensors = [[places, first], [others, second]]
    labels = algebra.concat(tensors, 1)
    algebra.settle([*tensors, labels])
    assert resolve(places) is resolve(others) is labels[0]
    # In both parts neurons keep an order of their own at every position: each sees it beside the concatenation.
    for family in (first, second):
        common = resolve(family)
        assert isinstance(common, Atom)
        assert common.context == {labels[0]}


@pytest.mark.parametrize("is_flagged_first", [True, False])
@pytest.mark.parametrize("is_cut", [True, False])
def test_what_is_said_of_neurons_holds_of_all_that_they_are_one_with(is_flagged_first: bool, is_cut: bool) -> None:
    algebra = AxisAlgebra()
    one, other = algebra.atom(12), algebra.atom(12)
    if is_cut:
        algebra.split_product(other, [3, 4])
    flagged, plain = (one, other) if is_flagged_first else (other, one)
    algebra.flag(resolve(flagged), "size-sensitive")
    algebra.unify(flagged, plain)
    for axis in (one, other):
        assert all(atom.flags == {"size-sensitive"} for atom in atoms_of(resolve(axis)))


def test_a_pin_holds_of_what_a_pinned_axis_is_cut_into_elsewhere() -> None:
    algebra = AxisAlgebra()
    fixed, free = algebra.pinned(12, "a position"), algebra.atom(12)
    outer, inner = algebra.split_product(free, [3, 4]) or []
    algebra.unify(fixed, free)
    for factor in (outer, inner):
        common = resolve(factor)
        assert isinstance(common, Atom)
        assert common.pin is not None
        assert not common.context


def test_factors_that_meet_a_plain_axis_keep_of_their_context_only_each_other() -> None:
    algebra = AxisAlgebra()
    plain, cut = algebra.atom(12), algebra.atom(24)
    outer, middle, inner = algebra.split_product(cut, [2, 3, 4]) or []
    assert isinstance(middle, Atom)
    assert isinstance(inner, Atom)
    assert inner.context == {outer, middle}
    # The plain axis has one order, whatever the outer index is.
    algebra.unify(plain, algebra.product([middle, inner]))
    algebra.settle([[cut]])
    assert middle.context == set()
    assert inner.context == {middle}


@pytest.mark.parametrize("is_pinned", [True, False])
def test_cases_beside_concatenations_that_meet_are_unified_option_by_option(is_pinned: bool) -> None:
    algebra = AxisAlgebra()

    def stacked() -> tuple[list[Atom], list[Expression]]:
        sizes = (2, 3)
        blocks = [algebra.pinned(size, "a position") if is_pinned else algebra.atom(size) for size in sizes]
        options = [algebra.atom(4) for _ in sizes]
        tensors = [[block, option] for block, option in zip(blocks, options, strict=True)]
        return options, algebra.concat(tensors, 0)

    (ours, mine), (theirs, other) = stacked(), stacked()
    for one, another in zip(mine, other, strict=True):
        algebra.unify(one, another)
    algebra.settle([mine, other])
    assert [resolve(option) for option in ours] == [resolve(option) for option in theirs]
    assert resolve(ours[0]) is not resolve(ours[1])


def test_options_that_are_tied_while_it_is_settled_are_settled_too() -> None:
    algebra = AxisAlgebra()
    one, other = algebra.atom(2), algebra.atom(3)
    first, second = algebra.atom(4, context={one}), algebra.atom(4, context={other})
    (_, either) = algebra.concat([[algebra.atom(5), first], [algebra.atom(6), second]], 0)
    # The blocks are out of sight, so both options are one; what they are indexed by, they do not share.
    algebra.settle([[one, other, either]])
    common = resolve(either)
    assert isinstance(common, Atom)
    assert common is resolve(first) is resolve(second)
    assert common.context == set()


def test_families_in_blocks_that_are_cut_out_are_those_of_their_block() -> None:
    algebra = AxisAlgebra()
    axis = algebra.atom(24)
    algebra.split_product(axis, [6, 4])
    blocks = algebra.cut([axis], 0, [8, 16]) or []
    algebra.settle([*blocks, [axis]])
    outer, inner = zip(*(pieces(resolve(block)) for (block,) in blocks), strict=True)
    for count, neurons, family in zip((2, 4), outer, inner, strict=True):
        assert isinstance(neurons, Atom)
        assert isinstance(family, Atom)
        assert (neurons.size, family.size, family.context) == (count, 4, {neurons})


@pytest.mark.parametrize("is_older", [True, False])
def test_a_pin_holds_of_both_whichever_is_older(is_older: bool) -> None:
    algebra = AxisAlgebra()
    one, other = algebra.atom(4), algebra.atom(4)
    algebra.pin(one if is_older else other, "because")
    common = algebra.unify(one, other)
    assert isinstance(common, Atom)
    assert str(common.pin) == "because"


def test_what_stands_in_one_block_only_is_not_seen_from_outside() -> None:
    tag, atom = Tag(), Atom(3)
    inside, outside = Occurrence(0, ((tag, 0),), atom=atom), Occurrence(1, ())
    assert inside.is_seen_from(Occurrence(1, ((tag, 0),)))
    assert inside.is_seen_from(Occurrence(1, ((tag, 1),))) is None
    assert not is_visible([inside], outside)
    assert is_visible([Occurrence(0, (), atom=atom)], outside)
