"""The axis algebra that rules work with."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_ot.graph.axes import concatenation, settling, splitting, unification
from mergekit_ot.graph.axes.expressions import Atom, Expression, Replicated, atoms_of, product, size_of
from mergekit_ot.graph.axes.reasons import PinReason
from mergekit_ot.graph.axes.union_find import UnionFind


class AxisAlgebra:
    """What a rule does with the labels of its operands: join, cut, multiply, flag; and what the trace does in between.

    Final, and without state of its own: the atoms are in a `UnionFind`, and each method says in one line which function
    changes them. Every call only removes freedom; what holds before and after is said in `mergekit_ot.graph.axes`.

    Attributes:
        atoms: The atoms of this trace.

    Example:
        >>> algebra = AxisAlgebra()
        >>> channels = algebra.atom(12)
        >>> heads, inner = algebra.split_product(channels, [3, 4])
        >>> heads.size, inner.size, inner.context == {heads}
        (3, 4, True)
    """

    def __init__(self) -> None:
        self.atoms = UnionFind()

    def atom(self, size: int, like: Atom | None = None, context: set[Atom] | None = None) -> Atom:
        """Returns a new axis of neurons with the context, pin and flags of `like`; free where there is none."""
        return self.atoms.atom(size, like, context)

    def pinned(self, size: int, why: str) -> Atom:
        """Returns a new axis that nothing may reorder."""
        return self.atoms.pinned(size, why)

    def replicated(self, size: int) -> Expression:
        """Returns an axis along which the tensor is constant."""
        return Replicated(size)

    def product(self, factors: Sequence[Expression]) -> Expression:
        """Returns the row-major product of axes, outermost first."""
        return product(factors)

    def size(self, expression: Expression) -> int:
        """Returns the number of indices along an axis."""
        return size_of(expression)

    def touch(self, expression: Expression) -> None:
        """Marks the atoms of `expression` as accounted for by the running rule."""
        self.atoms.touch(expression)

    def pin(self, expression: Expression, why: str) -> None:
        """Fixes every atom of `expression` at the identity."""
        self.atoms.pin(expression, why)

    def flag(self, expression: Expression, flag: str) -> None:
        """Marks the groups of an axis: ``uniform marginals only`` or ``size-sensitive``."""
        for atom in atoms_of(expression):
            atom.flags.add(flag)

    def unify(self, first: Expression, second: Expression) -> Expression:
        """Demands that both axes are always reordered alike; returns the common expression."""
        return unification.unify(self.atoms, first, second)

    def split_product(self, expression: Expression, sizes: Sequence[int]) -> list[Expression] | None:
        """Returns one expression per factor of a row-major index of `sizes`, or None where the blocks do not fit."""
        return splitting.split_product(self.atoms, expression, sizes)

    def split_concat(self, expression: Expression, sizes: Sequence[int]) -> list[splitting.Piece] | None:
        """Returns (block, what the cut means for cases on other axes) per size, or None where it cannot be cut."""
        return splitting.split_concat(self.atoms, expression, sizes)

    def concat(self, tensors: Sequence[Sequence[Expression]], axis: int) -> list[Expression]:
        """Returns the labels of tensors concatenated along `axis`; other axes that differ become cases."""
        return concatenation.concat(self.atoms, tensors, axis)

    def cut(self, labels: Sequence[Expression], axis: int, sizes: Sequence[int]) -> list[list[Expression]] | None:
        """Returns the labels of the blocks of `sizes` along `axis`, or None where it cannot be cut there."""
        return concatenation.cut(self.atoms, labels, axis, sizes)

    def settle(self, tensors: Sequence[Sequence[Expression]]) -> None:
        """Restores what must hold after an operation for the labels of all tensors that it read or made."""
        settling.settle(self.atoms, tensors)

    @property
    def reason(self) -> PinReason:
        """Where the running operation stands."""
        return self.atoms.reason

    def stand_at(self, reason: PinReason) -> None:
        """Says where the operation stands whose rule runs next; pins carry it."""
        self.atoms.reason = reason

    @property
    def touched(self) -> set[Atom]:
        """What the running rule has accounted for, since `forget_touched`."""
        return self.atoms.touched

    def forget_touched(self) -> None:
        """Begins to count anew what a rule accounts for."""
        self.atoms.touched = set()
