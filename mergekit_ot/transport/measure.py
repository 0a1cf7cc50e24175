"""Neuron measures: what a solver is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mergekit_ot.transport.support import AbstractDeferredSupport, weighed

_MASS_TOLERANCE = 1e-3

SIGN = "sign"
ORTHOGONAL, FIXED_MEAN = "orthogonal", "orthogonal with fixed mean"
ROTARY = "rotary"
# Symmetries whose elements are orthogonal matrices.
ROTATIONS = (ORTHOGONAL, FIXED_MEAN, ROTARY)


@dataclass(frozen=True)
class Signs:
    """Which numbers of a measure follow a neuron's direction, where the network allows more than another order.

    Where neurons may be negated without changing the function, these are the numbers that change sign; where they may
    be rotated, those that rotate with them.

    Attributes:
        columns: Per column of the support. Shape ``[d]``.
        rows: Per structure matrix, whether its rows do. Shape ``[s]``.
        readers: Per structure matrix, whether its columns do. Shape ``[s]``.
        symmetry: Name of the symmetry: ``sign``, or one of `mergekit_ot.ROTATIONS`.

    Example:
        >>> yes = torch.ones(1, dtype=torch.bool)
        >>> Signs(columns=yes, rows=yes, readers=~yes).readers.tolist()
        [False]
    """

    columns: Bool[Tensor, " d"]
    rows: Bool[Tensor, " s"]
    readers: Bool[Tensor, " s"]
    symmetry: str = SIGN

    @property
    def may_rotate(self) -> bool:
        """Whether neurons may be replaced by rotations of them, and not only be negated."""
        return self.symmetry in ROTATIONS


@dataclass(frozen=True)
class NeuronMeasure:
    """The neurons of one group in one source model, as a discrete probability measure.

    Attributes:
        support: One row per neuron: what the neuron is seen by (weights, activations …), expressed in
            coordinates that all measures of one problem share. Shape ``[n, d]``; ``d`` may be 0.
        mass: Mass of each neuron, non-negative, summing to one. Shape ``[n]``.
        structure: Matrices in which the group refers to itself, asymmetric in general. Shape ``[s, n, n]``.
        signs: What changes sign with a neuron, where the network allows one to be negated (an odd activation) and the
            solver asks for it; None where the sign of a neuron means something.

    Example:
        >>> measure = NeuronMeasure.uniform(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> measure.size, measure.mass.tolist(), measure.is_uniform
        (2, [0.5, 0.5], True)
    """

    support: Float[Tensor, "n d"]
    mass: Float[Tensor, " n"]
    structure: Float[Tensor, "s n n"] | None = None
    signs: Signs | None = None

    @classmethod
    def uniform(
        cls,
        support: Float[Tensor, "n d"] | AbstractDeferredSupport,
        structure: Float[Tensor, "s n n"] | None = None,
        signs: Signs | None = None,
    ) -> NeuronMeasure:
        """Returns the measure in which every neuron has the same mass."""
        if isinstance(support, AbstractDeferredSupport):
            like = torch.empty(0, dtype=support.dtype, device=support.device)
            return DeferredMeasure(support, uniform_mass(support.shape[0], like), structure, signs)
        return cls(support, uniform_mass(support.shape[0], support), structure, signs)

    @property
    def size(self) -> int:
        """Number of neurons."""
        return self.support.shape[0]

    @property
    def columns(self) -> int:
        """Number of columns of the support."""
        return self.support.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the support."""
        return self.support.dtype

    @property
    def joined(self) -> Float[Tensor, "n d"] | None:
        """The support where it has been made, None where nobody has asked for it yet."""
        return self.support

    @property
    def deferred(self) -> AbstractDeferredSupport | None:
        """What makes the support when it is asked for, None where it is there from the start."""
        return None

    @property
    def support_print(self) -> Tensor | None:
        """What `weighed` said of a deferred support when it was joined; None where none was."""
        return None

    @property
    def is_uniform(self) -> bool:
        """Whether every neuron has the same mass."""
        return bool(torch.allclose(self.mass, uniform_mass(self.size, self.mass), atol=0, rtol=1e-6))


class DeferredMeasure(NeuronMeasure):
    """A measure whose support is joined when it is first asked for; to a solver it is a measure like any other.

    Example:
        >>> from mergekit_ot.transport.support import ComputedSupport
        >>> measure = NeuronMeasure.uniform(ComputedSupport(lambda: torch.eye(2), torch.empty(0), (2, 2)))
        >>> measure.size, measure.joined is None, measure.support.tolist()
        (2, True, [[1.0, 0.0], [0.0, 1.0]])
    """

    def __init__(
        self,
        support: Float[Tensor, "n d"] | AbstractDeferredSupport,
        mass: Float[Tensor, " n"],
        structure: Float[Tensor, "s n n"] | None = None,
        signs: Signs | None = None,
    ) -> None:
        is_deferred = isinstance(support, AbstractDeferredSupport)
        held = {"mass": mass, "structure": structure, "signs": signs, "_rows": support if is_deferred else None}
        # The class it derives from is frozen.
        for name, value in {**held, **({} if is_deferred else {"support": support})}.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Tensor:
        # Reached only while the instance has no such attribute yet.
        rows = vars(self).get("_rows")
        if name != "support" or rows is None:
            raise AttributeError(name)
        support = rows.join()
        object.__setattr__(self, "support", support)
        object.__setattr__(self, "_print", weighed(support))
        return support

    @property
    def size(self) -> int:
        """Number of neurons."""
        return self.mass.shape[0]

    @property
    def columns(self) -> int:
        """Number of columns of the support."""
        rows = self.deferred
        return self.support.shape[1] if rows is None else rows.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the support."""
        rows = self.deferred
        return self.support.dtype if rows is None else rows.dtype

    @property
    def joined(self) -> Float[Tensor, "n d"] | None:
        """The support where it has been made."""
        return vars(self).get("support")

    @property
    def deferred(self) -> AbstractDeferredSupport | None:
        """What makes the support when it is asked for."""
        return vars(self)["_rows"]

    @property
    def support_print(self) -> Tensor | None:
        """What `weighed` said of the support when it was joined."""
        return vars(self).get("_print")


def flaw_of(measure: object) -> str:
    """Returns what makes something no neuron measure, in words; nothing where all is well.

    Numbers that are not finite are no flaw of the measure: they stand in the sources, and a solver says so.

    Example:
        >>> flaw_of(NeuronMeasure(torch.zeros(2, 3), torch.tensor([1.5, -0.5])))
        'a mass is negative'
    """
    if not isinstance(measure, NeuronMeasure):
        return f"a {type(measure).__name__} is no NeuronMeasure"
    rows, mass, structure = measure.deferred, measure.mass, measure.structure
    shape = tuple(measure.support.shape) if rows is None else rows.shape
    if len(shape) != 2 or tuple(mass.shape) != shape[:1]:
        return f"a support of shape {shape} with masses of shape {tuple(mass.shape)}"
    if structure is not None and (structure.dim() != 3 or {*structure.shape[1:]} - {measure.size}):
        return f"a structure of shape {tuple(structure.shape)} for {measure.size} neurons"
    if bool((mass < 0).any()):
        return "a mass is negative"
    if measure.size and not abs(float(mass.sum()) - 1) < _MASS_TOLERANCE:
        return f"masses that sum to {float(mass.sum()):.4g}, not to one"
    return ""


def uniform_mass(size: int, like: Tensor) -> Float[Tensor, " n"]:
    """Returns `size` equal masses in the dtype and on the device of `like`.

    Example:
        >>> uniform_mass(4, torch.zeros(1)).tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    return torch.full((size,), 1.0 / max(size, 1), dtype=like.dtype, device=like.device)
