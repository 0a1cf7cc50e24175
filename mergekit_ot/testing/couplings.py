"""The contract of couplings, clause by clause: everything a coupling says about itself agrees with its dense plan."""

from __future__ import annotations

import pickle
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_ot.testing.clauses import Contract
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.measure import Signs

_TOLERANCE = 1e-9


def check_coupling(coupling: Coupling, seed: int = 0) -> None:
    """Checks that a coupling's marginals, maps, entries and movements are those of its dense plan.

    A kind of coupling is right if random ones of it pass.

    Args:
        coupling: The coupling, of any kind.
        seed: Seed of what it moves.

    Raises:
        PluginError: A clause is broken; the message says which.

    Example:
        >>> from mergekit_ot import Permutation
        >>> check_coupling(Permutation(torch.tensor([2, 0, 1]), torch.tensor([1.0, -1.0, 1.0])))
    """
    advice = "Correct the class; the clauses are listed in mergekit_ot.testing.check_coupling."
    contract = Contract(f"The coupling {type(coupling).__name__}", advice)
    for clause in _CLAUSES:
        contract.check(clause, _Dense(coupling, seed))


@dataclass(frozen=True)
class _Dense:
    """A coupling beside its dense plan in double precision, and random numbers to move."""

    coupling: Coupling
    seed: int

    @property
    def like(self) -> Tensor:
        return torch.zeros(1, dtype=torch.float64)

    @property
    def plan(self) -> Tensor:
        return self.coupling.transport_plan(self.like)

    @property
    def signed(self) -> Tensor:
        return self.coupling.signed_plan(self.like)

    @property
    def size(self) -> int:
        return self.coupling.target_size

    def weights(self, reads: bool, is_signed: bool) -> Tensor:
        """Returns the map ``[target, source]`` of axes that read neurons, or of those that own them."""
        mass = self.plan.sum(0 if reads else 1, keepdim=True)
        return (self.signed if is_signed else self.plan) / torch.where(mass > 0, mass, 1.0)

    def directed(self, reads: bool) -> Tensor:
        """Returns the map ``[target, source]`` of numbers that follow a neuron's direction."""
        return self.coupling.linear_map(reads, self.like)

    @property
    def is_map(self) -> bool:
        """Whether neurons are mixed without a loss: what they make goes by a map of its own, and not by the plan."""
        return self.coupling.is_exact and not self.coupling.is_permutation

    def values(self, *shape: int) -> Tensor:
        """Returns Gaussian numbers."""
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed), dtype=torch.float64)

    def coins(self, *shape: int) -> Tensor:
        """Returns truth values."""
        return self.values(*shape) > 0

    def others(self) -> list[Coupling]:
        """Returns couplings of the same fused neurons with other sources: this one in other orders and signs."""
        return [self.coupling.in_order(self.order()), self.coupling.negated(self.sign())]

    def order(self) -> Tensor:
        """Returns an order of the fused neurons."""
        return torch.randperm(self.size, generator=torch.Generator().manual_seed(self.seed))

    def sign(self) -> Tensor:
        """Returns a sign for each fused neuron."""
        return torch.where(self.coins(self.size), -1.0, 1.0).double()


def _has_no_flaw(dense: _Dense) -> str:
    """The coupling finds no flaw in itself."""
    return dense.coupling.flaw()


def _plan_is_a_plan(dense: _Dense) -> str:
    """The plan has the sizes of both sides, no negative mass, and the marginals that the coupling tells."""
    coupling, plan = dense.coupling, dense.plan
    if tuple(plan.shape) != (coupling.target_size, coupling.source_size):
        return f"the plan has shape {tuple(plan.shape)}"
    if bool((plan < 0).any()):
        return "the plan holds negative mass"
    return _differs("the target marginal", coupling.target_marginal(dense.like), plan.sum(1)) or _differs(
        "the source marginal", coupling.source_marginal(dense.like), plan.sum(0)
    )


def _signs_are_signs(dense: _Dense) -> str:
    """The signed plan is the plan with some entries negated."""
    return _differs("its size", dense.signed.abs(), dense.plan)


def _directions_follow_the_signed_plan(dense: _Dense) -> str:
    """What follows a neuron's direction moves by the signed plan; where neurons are mixed, by a map of its own."""
    if dense.is_map:
        return ""
    pairs = ((reads, dense.directed(reads), dense.weights(reads, True)) for reads in (False, True))
    details = (_differs(f"the linear map (reads={reads})", found, expected) for reads, found, expected in pairs)
    return next((detail for detail in details if detail), "")


def _maps_are_stochastic(dense: _Dense) -> str:
    """What arrives at a fused neuron, and what leaves a source neuron, is shared out to one."""
    average, split = dense.coupling.average_map(dense.like), dense.coupling.split_map(dense.like)
    arrives, leaves = (dense.plan.sum(1) > 0).double(), (dense.plan.sum(0) > 0).double()
    return _differs("a row sum of the average map", average.sum(1), arrives) or _differs(
        "a row sum of the split map", split.sum(1), leaves
    )


def _presence_and_partners_are_those_of_the_plan(dense: _Dense) -> str:
    """A fused neuron is present if mass arrives at it, and its partner is a source neuron that gives it the most."""
    here = dense.coupling.presence(dense.like)
    expected = (dense.plan.sum(1) > 0).double()
    if here is None and not bool(expected.all()):
        return "presence is None though a fused neuron has no partner"
    most = dense.plan.gather(1, dense.coupling.partners()[:, None])[:, 0]
    return _differs("presence", expected if here is None else here, expected) or _differs(
        "the mass of the partners", most, dense.plan.amax(1)
    )


def _entries_are_those_of_the_maps(dense: _Dense) -> str:
    """The entries, for axes that own neurons and for axes that read them, are those of the dense maps."""
    for reads in (False, True):
        weights = torch.zeros_like(dense.plan)
        for target, source, weight in dense.coupling.entries(reads):
            weights[target, source] += weight
        detail = _differs(f"an entry (reads={reads})", weights, dense.weights(reads, False), 1e-6)
        if detail:
            return detail
    return ""


def _values_follow_the_maps(dense: _Dense) -> str:
    """Values on any axis move by the dense maps, and change sign where they are odd; what moves stays untouched."""
    values = dense.values(2, dense.coupling.source_size, 3)
    before, odd = values.clone(), dense.coins(2, 1, 3)
    for reads in (False, True):
        maps = dense.weights(reads, False), dense.directed(reads)
        even, negated = (torch.einsum("jk,akb->ajb", each, values) for each in maps)
        for is_odd, expected in ((False, even), (True, negated), (odd, torch.where(odd, negated, even))):
            detail = _differs(f"a value (reads={reads})", dense.coupling.move(values, 1, reads, is_odd), expected)
            if detail:
                return detail
        last = dense.coupling.move(values.movedim(1, 2), 2, reads)
        if not torch.equal(values, before) or _differs("", last, even.movedim(1, 2)):
            return "another axis moved differently, or values were written to"
    return ""


def _measures_follow_the_maps(dense: _Dense) -> str:
    """A measure's support is averaged, its structure averaged and split, with the signs that the measure names."""
    coupling, size = dense.coupling, dense.coupling.source_size
    signs = Signs(dense.coins(5), dense.coins(6)[:3], dense.coins(6)[3:])
    support, structure = dense.values(size, 5), dense.values(3, size, size)
    makers = dense.weights(False, False), dense.directed(False)
    readers = dense.weights(True, False), dense.directed(True)
    columns = [makers[is_odd] @ column for column, is_odd in zip(support.T, signs.columns.tolist(), strict=True)]
    matrices = [
        makers[row] @ matrix @ readers[reader].T
        for matrix, row, reader in zip(structure, signs.rows.tolist(), signs.readers.tolist(), strict=True)
    ]
    plain = dense.weights(False, False)
    return (
        _differs("a signed support", coupling.move_support(support, signs), torch.stack(columns, 1))
        or _differs("a support", coupling.move_support(support), plain @ support)
        or _differs("a signed structure", coupling.move_structure(structure, signs), torch.stack(matrices))
        or _differs("a structure", coupling.move_structure(structure), plain @ structure @ dense.weights(True, False).T)
        or _differs("a product", coupling.times_transposed(structure), dense.plan @ structure.transpose(1, 2))
    )


def _targets_are_reordered_and_negated(dense: _Dense) -> str:
    """Fused neurons in another order, negated, or with other signs are those of the dense plan."""
    order, sign, signs = dense.order(), dense.sign(), torch.where(dense.coins(*dense.plan.shape), -1.0, 1.0).double()
    reordered, negated, signed = (
        coupling.signed_plan(dense.like)
        for coupling in (dense.coupling.in_order(order), dense.coupling.negated(sign), dense.coupling.with_signs(signs))
    )
    return (
        _differs("in_order", reordered, dense.signed[order])
        or _differs("negated", negated, sign[:, None] * dense.signed)
        or _differs("with_signs", signed, signs * dense.plan)
    )


def _source_order_keeps_who_meets_whom(dense: _Dense) -> str:
    """In the order of the coupling's source, the same neurons meet at the same relative signs."""
    couplings = [dense.coupling, *dense.others()]
    ordered = dense.coupling.in_source_order(couplings)
    if dense.coupling.is_permutation and not ordered[0].is_identity:
        return "a permutation is not the identity in its own order"
    for before, after in zip(couplings, ordered, strict=True):
        if _differs("", _meeting(ordered[0], after, dense), _meeting(dense.coupling, before, dense)):
            return "neurons met others"
    return ""


def _meeting(one: Coupling, other: Coupling, dense: _Dense) -> Tensor:
    """Returns how the neurons of two sources meet: by the plans, or by the maps where neurons are mixed."""
    if dense.is_map:
        return one.linear_map(True, dense.like).T @ other.linear_map(False, dense.like)
    return one.signed_plan(dense.like).T @ other.signed_plan(dense.like)


def _exact_couplings_keep_functions(dense: _Dense) -> str:
    """An exact coupling gives back to the readers of a neuron what it took from its owners."""
    coupling, size = dense.coupling, dense.coupling.source_size
    if coupling.is_identity != (dense.size == size and not _differs("", dense.signed * size, torch.eye(size).double())):
        # A plan that happens to be the identity need not know it.
        return "is_identity is wrong" if coupling.is_permutation or coupling.is_identity else ""
    there_and_back = dense.directed(True).T @ dense.directed(False)
    return _differs("what is read", there_and_back, torch.eye(size).double()) if coupling.is_exact else ""


def _copies_are_the_same(dense: _Dense) -> str:
    """A coupling is the same as itself, as its pickled copy and as its copy in its own dtype, and as no other."""
    coupling = dense.coupling
    like = next((tensor for tensor in coupling.tensors if tensor.is_floating_point()), torch.empty(0))
    copies = (coupling, pickle.loads(pickle.dumps(coupling)), coupling.to(like))
    if not all(coupling.is_same(copy) and copy.is_same(coupling) for copy in copies):
        return "it is not the same as its copy"
    for other in dense.others():
        if coupling.is_same(other) != torch.equal(coupling.signed_plan(), other.signed_plan()):
            return "is_same says something else than the plans"
    return "it is the same as something that is no coupling" if coupling.is_same(None) else ""


_CLAUSES = (
    _has_no_flaw,
    _plan_is_a_plan,
    _signs_are_signs,
    _maps_are_stochastic,
    _directions_follow_the_signed_plan,
    _presence_and_partners_are_those_of_the_plan,
    _entries_are_those_of_the_maps,
    _values_follow_the_maps,
    _measures_follow_the_maps,
    _targets_are_reordered_and_negated,
    _source_order_keeps_who_meets_whom,
    _exact_couplings_keep_functions,
    _copies_are_the_same,
)


def _differs(name: str, found: Tensor, expected: Tensor, tolerance: float = _TOLERANCE) -> str:
    """Returns the sentence for tensors that differ, and nothing for those that do not."""
    if found.shape != expected.shape:
        return f"{name or 'a tensor'} has shape {tuple(found.shape)}, that of the dense plan {tuple(expected.shape)}"
    distance = float((found - expected).abs().max()) if found.numel() else 0.0
    return "" if distance <= tolerance else f"{name} is {distance:.2g} away from that of the dense plan"
