"""`check_coupling` passes both of our kinds, and each clause of it fails a kind that breaks that clause alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from draws import Draw
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_ot import Coupling, InvertibleMap, Permutation, Plan, SolverError
from mergekit_ot.errors import PluginError
from mergekit_ot.testing import check_coupling

LAW = settings(deadline=None, max_examples=40)
SEEDS = st.integers(0, 10_000)
SIZES = st.integers(1, 5)


@LAW
@given(SIZES, st.booleans(), SEEDS)
def test_permutations_keep_the_contract(size: int, is_signed: bool, seed: int) -> None:
    draw = Draw(seed)
    index = torch.randperm(size, generator=draw.generator)
    check_coupling(Permutation(index, draw.sign(size) if is_signed else None), seed)


@LAW
@given(SIZES, SIZES, st.booleans(), st.booleans(), SEEDS)
def test_plans_keep_the_contract(rows: int, columns: int, is_signed: bool, is_partial: bool, seed: int) -> None:
    draw = Draw(seed)
    plan = torch.rand(rows, columns, generator=draw.generator, dtype=torch.float64)
    plan[draw.coin(rows, columns)] = 0.0
    plan[rows - 1, 0] = 1.0
    if is_partial:
        plan[: rows // 2] = 0.0
    check_coupling(Plan(plan / plan.sum(), draw.sign(rows, columns) if is_signed else None), seed)


@LAW
@given(SIZES, SEEDS)
def test_rotations_keep_the_contract(size: int, seed: int) -> None:
    matrix = torch.linalg.qr(Draw(seed).gaussian(size, size)).Q
    check_coupling(InvertibleMap(matrix), seed)


@LAW
@given(SIZES, SIZES, SEEDS)
def test_maps_into_wider_groups_keep_the_contract(size: int, more: int, seed: int) -> None:
    # Of a single neuron every plan is the same.
    size += 1
    columns = torch.linalg.qr(Draw(seed).gaussian(size + more, size)).Q
    check_coupling(InvertibleMap(columns * ((size + more) / size) ** 0.5), seed)


@LAW
@given(SIZES, SEEDS)
def test_invertible_maps_keep_the_contract(size: int, seed: int) -> None:
    draw = Draw(seed)
    left, right = (torch.linalg.qr(draw.gaussian(size, size)).Q for _ in range(2))
    stretch = 0.5 + torch.rand(size, generator=draw.generator, dtype=torch.float64)
    matrix = left @ torch.diag(stretch) @ right
    check_coupling(InvertibleMap(matrix, torch.linalg.inv(matrix).T), seed)


@pytest.mark.parametrize(
    ("coupling", "flaw"),
    [
        (InvertibleMap(2 * torch.eye(3)), "not the inverse"),
        (InvertibleMap(torch.ones(2, 3)), "not a square matrix"),
        (InvertibleMap(torch.eye(3), torch.eye(2)), "map of the readers has shape"),
        (InvertibleMap(torch.tensor([[1.0, 1.0], [0.0, 1.0]])), "not the inverse"),
    ],
)
def test_what_is_no_invertible_map_is_told(coupling: InvertibleMap, flaw: str) -> None:
    assert flaw in coupling.flaw()


def rolled(name: str) -> Any:
    """A method whose result is that of the kind's own, one fused neuron off."""

    def method(self: Plan, *arguments: Any, **options: Any) -> Any:
        result = getattr(Plan, name)(self, *arguments, **options)
        if isinstance(result, Coupling):
            return result.in_order(torch.arange(result.target_size).roll(1))
        return result.roll(1, 0)

    return method


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "negative mass": ({"transport_plan": lambda self, like=None: -Plan.transport_plan(self, like)}, "no negative mass"),
    "marginals": ({"target_marginal": rolled("target_marginal")}, "the target marginal is"),
    "size": ({"target_size": property(lambda self: 7)}, "the plan has shape"),
    "signs": ({"signed_plan": lambda self, like=None: 2 * Plan.signed_plan(self, like)}, "some entries negated"),
    "maps": (
        {"average_map": lambda self, like=None, s=False: 2 * Plan.average_map(self, like, s)},
        "a row sum of the average",
    ),
    "presence": ({"presence": lambda self, like=None: torch.zeros(4).double()}, "presence is 1"),
    "partners": ({"partners": rolled("partners")}, "the mass of the partners is"),
    "entries": ({"entries": lambda self, reads: iter([(0, 0, 1.0)])}, "an entry"),
    "roles": ({"move": lambda self, v, a, r, o=False: Plan.move(self, v, a, not r, o)}, "a value"),
    "oddness": ({"move": lambda self, v, a, r, o=False: Plan.move(self, v, a, r, False)}, "a value"),
    "axes": ({"move": lambda self, v, a, r, o=False: Plan.move(self, v, 1, r, o)}, "another axis|shape"),
    "support": ({"move_support": lambda self, v, s=None: Plan.move_support(self, v)}, "a signed support"),
    "structure": ({"move_structure": lambda self, v, s=None: Plan.move_structure(self, v)}, "a signed structure"),
    "product": ({"times_transposed": lambda self, v: 2 * Plan.times_transposed(self, v)}, "a product"),
    "order": ({"in_order": lambda self, order: Plan.in_order(self, order.argsort())}, "in_order is"),
    "negated": ({"negated": lambda self, sign: self}, "negated is"),
    "pairs": ({"with_signs": lambda self, sign: self}, "with_signs is"),
    "source order": ({"in_source_order": lambda self, all: (self, *all[:-1])}, "neurons met others"),
    "exactness": ({"is_exact": property(lambda self: True)}, "what is read is"),
    "identity": ({"is_identity": property(lambda self: True)}, "is_identity is wrong"),
    "sameness": ({"is_same": lambda self, other, rtol=0.0, atol=0.0: True}, "is_same says something else"),
    "reflexivity": ({"is_same": lambda self, other, rtol=0.0, atol=0.0: self is other}, "not the same as its copy"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_each_clause_fails_the_kind_that_breaks_it(name: str) -> None:
    methods, message = BROKEN[name]
    draw = Draw(3)
    plan = torch.rand(4, 3, generator=draw.generator, dtype=torch.float64) + 0.1
    check_coupling(Plan(plan / plan.sum(), draw.sign(4, 3)), seed=1)
    kind = type("Broken", (Plan,), methods)
    # So that pickle finds it.
    globals()["Broken"], kind.__module__ = kind, __name__
    with pytest.raises(PluginError, match=message) as raised:
        check_coupling(kind(plan / plan.sum(), draw.sign(4, 3)), seed=1)
    assert "The coupling Broken breaks its contract. The clause: " in str(raised.value)


def test_the_abstract_class_names_the_kinds() -> None:
    for arguments in ((), (torch.arange(2),)):
        with pytest.raises(SolverError, match=r"Permutation\(index, sign\).*Plan\(matrix, sign\)"):
            Coupling(*arguments)  # type: ignore[abstract]
    with pytest.raises(SolverError, match="A Coupling is abstract"):
        Coupling(index=torch.arange(2))  # type: ignore[abstract]
