"""Couplings: how the neurons of the fused group correspond to those of one source.

`Coupling` says what can be asked of any of them. A final class per kind, `Permutation`, `Plan` and `InvertibleMap`,
knows how it is stored, and nobody else does: a new kind is one more final class, and no caller changes.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator, Sequence
from typing import Self, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mergekit_ot.errors import SolverError
from mergekit_ot.transport.measure import Signs


class Coupling(abc.ABC):
    """How the neurons of the fused group correspond to the neurons of one source, and how numbers follow.

    Abstract: a `Permutation`, a `Plan` or an `InvertibleMap`.

    Example:
        >>> from mergekit_ot import Permutation, Plan
        >>> couplings = [Permutation(torch.tensor([1, 0])), Plan(torch.full((2, 3), 1 / 6))]
        >>> [(coupling.source_size, coupling.is_exact) for coupling in couplings]
        [(2, True), (3, False)]
    """

    def __new__(cls, *arguments: object, **options: object) -> Self:
        """Refuses the abstract class itself.

        Raises:
            SolverError: `Coupling` was called.
        """
        if cls is Coupling:
            raise SolverError(
                "A Coupling is abstract: what it holds depends on its kind. Write Permutation(index, sign) where every "
                "fused neuron is one neuron of the source, Plan(matrix, sign) for a transport plan, or "
                "InvertibleMap(matrix) for a rotation."
            )
        return super().__new__(cls)

    @property
    @abc.abstractmethod
    def target_size(self) -> int:
        """Number of neurons on the fused side."""

    @property
    @abc.abstractmethod
    def source_size(self) -> int:
        """Number of neurons on the source's side."""

    @property
    @abc.abstractmethod
    def is_permutation(self) -> bool:
        """Whether the coupling only reorders neurons (and negates some)."""

    @property
    @abc.abstractmethod
    def is_exact(self) -> bool:
        """Whether a source that is moved by the coupling still computes its function."""

    @property
    @abc.abstractmethod
    def is_identity(self) -> bool:
        """Whether every neuron is coupled with the one at the same place, as it is."""

    @property
    @abc.abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """What the coupling is stored as."""

    @abc.abstractmethod
    def flaw(self) -> str:
        """Returns what makes this no coupling, such as a negative mass, in words; nothing where all is well."""

    @abc.abstractmethod
    def to(self, like: Tensor) -> Coupling:
        """Returns the coupling on the device of `like`, its masses and signs in the dtype of `like`."""

    @abc.abstractmethod
    def is_same(self, other: object, rtol: float = 0.0, atol: float = 0.0) -> bool:
        """Whether another coupling joins the same neurons with the same mass and sign, up to a tolerance of both."""

    @abc.abstractmethod
    def transport_plan(self, like: Tensor | None = None) -> Float[Tensor, "m n"]:
        """Returns the dense plan ``[target, source]`` in the dtype and on the device of `like`."""

    @abc.abstractmethod
    def signed_plan(self, like: Tensor | None = None) -> Float[Tensor, "m n"]:
        """Returns the dense plan with the entries of negated neurons negative."""

    @abc.abstractmethod
    def target_marginal(self, like: Tensor | None = None) -> Float[Tensor, " m"]:
        """Returns the mass that arrives at each fused neuron."""

    @abc.abstractmethod
    def source_marginal(self, like: Tensor | None = None) -> Float[Tensor, " n"]:
        """Returns the mass that leaves each source neuron."""

    @abc.abstractmethod
    def presence(self, like: Tensor | None = None) -> Float[Tensor, " m"] | None:
        """Returns 1 for fused neurons that have a partner in the source and 0 for those that have none.

        None where all have one, as in every coupling whose marginals are the masses.
        """

    @abc.abstractmethod
    def partners(self) -> Int[Tensor, " m"]:
        """Returns the source neuron that each fused neuron takes most from."""

    @abc.abstractmethod
    def entries(self, reads: bool) -> Iterator[tuple[int, int, float]]:
        """Yields (target, source, weight) of the map for axes that own neurons, or of that for axes that read them."""

    @abc.abstractmethod
    def move(self, values: Tensor, axis: int, reads: bool, is_odd: bool | Bool[Tensor, ...] = False) -> Tensor:
        """Returns values with an axis moved to the fused neurons: averaged, or split where the axis reads them.

        What flows through a split neuron is conserved. The result may be `values` itself.

        Args:
            values: Hold the source's neurons on `axis`.
            axis: Which axis.
            reads: Whether the axis reads neurons; otherwise it owns them.
            is_odd: Whether the numbers follow a neuron's direction (its sign, a map), and not its place alone; a mask
                that broadcasts against the result, where only some do.
        """

    @abc.abstractmethod
    def move_support(self, support: Float[Tensor, "n d"], signs: Signs | None = None) -> Float[Tensor, "m d"]:
        """Returns a measure's support moved to the fused neurons, columns that `signs` names negated with them."""

    @abc.abstractmethod
    def move_structure(self, structure: Float[Tensor, "s n n"], signs: Signs | None = None) -> Float[Tensor, "s m m"]:
        """Returns a measure's structure averaged on its rows and split on its columns."""

    @abc.abstractmethod
    def times_transposed(self, matrices: Float[Tensor, "s q n"]) -> Float[Tensor, "s m q"]:
        """Returns the unsigned plan times the transpose of each matrix."""

    @abc.abstractmethod
    def in_order(self, order: Int[Tensor, " m"]) -> Coupling:
        """Returns the coupling with its target neurons in another order: place j holds target neuron ``order[j]``."""

    @abc.abstractmethod
    def negated(self, sign: Float[Tensor, " m"]) -> Coupling:
        """Returns the coupling with target neurons negated where `sign` is -1."""

    @abc.abstractmethod
    def with_signs(self, sign: Float[Tensor, "m n"]) -> Coupling:
        """Returns the coupling with each pair of neurons that it joins at the sign that stands for the pair."""

    @abc.abstractmethod
    def in_source_order(self, couplings: Sequence[Coupling]) -> tuple[Coupling, ...]:
        """Returns couplings with the fused neurons in the order and signs of this one's source.

        As they are where this one does not tell the order.
        """

    def linear_map(self, reads: bool, like: Tensor | None = None) -> Float[Tensor, "m n"]:
        """Returns the matrix by which numbers move that follow a neuron's direction: the maps below, signs included.

        Args:
            reads: Whether it is that of axes that read neurons.
            like: Gives dtype and device.
        """
        return self.split_map(like, True).T if reads else self.average_map(like, True)

    @final
    def average_map(self, like: Tensor | None = None, is_signed: bool = False) -> Float[Tensor, "m n"]:
        """Returns the barycentric projection for axes that own neurons: rows sum to one, up to signs."""
        plan = self.transport_plan(like)
        return (self.signed_plan(like) if is_signed else plan) / _nonzero(plan.sum(1, keepdim=True))

    @final
    def split_map(self, like: Tensor | None = None, is_signed: bool = False) -> Float[Tensor, "n m"]:
        """Returns the map for axes that read neurons: what a source neuron sends is shared out, rows sum to one."""
        plan = self.transport_plan(like)
        return ((self.signed_plan(like) if is_signed else plan) / _nonzero(plan.sum(0, keepdim=True))).T


def telling_sign(sign: Float[Tensor, ...] | None) -> Float[Tensor, ...] | None:
    """Returns a coupling's signs, and None where they negate nothing.

    Example:
        >>> telling_sign(torch.ones(2)) is None
        True
    """
    return None if sign is None or bool((sign > 0).all()) else sign


def have_close_plans(coupling: Coupling, other: object, rtol: float, atol: float) -> bool:
    """Whether two couplings have the same signed plan, up to a relative and an absolute tolerance.

    Example:
        >>> from mergekit_ot import Permutation, Plan
        >>> have_close_plans(Permutation.identity(2), Plan(torch.eye(2) / 2), rtol=0, atol=0)
        True
    """
    if not isinstance(other, Coupling):
        return False
    ours, theirs = coupling.signed_plan(), other.signed_plan()
    return ours.shape == theirs.shape and bool(torch.allclose(ours, theirs.to(ours), rtol=rtol, atol=atol))


def _nonzero(mass: Tensor) -> Tensor:
    return torch.where(mass > 0, mass, torch.ones_like(mass))
