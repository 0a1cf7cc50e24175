"""Pinned axes are one axis where they meet: what is indexed by them stays free."""

from __future__ import annotations

from mergekit_ot.graph.axes.algebra import AxisAlgebra
from mergekit_ot.graph.axes.expressions import Atom, resolve


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
