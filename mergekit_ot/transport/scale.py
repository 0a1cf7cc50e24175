"""Numbers whose squares leave the range of their type: problems are brought to a common scale, and back."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.transport.measure import NeuronMeasure, uniform_mass
from mergekit_ot.transport.problem import BarycenterProblem

# Squares of numbers in this range, summed over millions of columns and weighed by the square of a width, stay where
# single (double) precision holds all of their digits. Problems that lie in it are left as they are, bit for bit.
_SINGLE, _DOUBLE = 2.0**40, 2.0**400


def squarable(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Returns tensors in double precision where squares of their numbers would overflow or vanish, else as they are.

    One tensor that needs it takes all of them along, so that they can be compared.

    Example:
        >>> [tensor.dtype for tensor in squarable(torch.ones(2, 1), torch.full((2, 1), 1e30))]
        [torch.float64, torch.float64]
        >>> squarable(torch.ones(2, 1))[0].dtype
        torch.float32
    """
    # Apple's devices have no double precision.
    if all(tensor.device.type == "mps" or _has_room(tensor.reshape(1, -1)) for tensor in tensors):
        return tensors
    return tuple(tensor.double() for tensor in tensors)


@dataclass(frozen=True)
class Scaled:
    """A problem at another scale.

    Attributes:
        problem: The problem whose numbers are those of the given one times ``2 ** -exponent``.
        exponent: 0 where nothing was changed.

    Example:
        >>> measure = NeuronMeasure.uniform(torch.tensor([[2.0**100]]))
        >>> scaled = Scaled.of(BarycenterProblem((measure,), (1.0,), size=1))
        >>> scaled.exponent, scaled.problem.measures[0].support.item(), scaled.cost(3.0) == 3 * 2.0**200
        (100, 1.0, True)
    """

    problem: BarycenterProblem
    exponent: int = 0

    @classmethod
    def of(cls, problem: BarycenterProblem) -> Scaled:
        """Returns a problem of finite measures at a scale at which costs are finite and keep their digits.

        Supports and structures of all sources are divided by one power of two, in double precision: couplings, and
        what is relative to the costs, stay what they are. A source of no weight, which the objective does not look at,
        is brought to its own scale, at which it is coupled as at any other.
        """
        counting = [problem.measures[place] for place in problem.counting]
        if all(_measure_has_room(measure) for measure in problem.measures):
            return cls(problem)
        common = max((_exponent(measure) for measure in counting), default=0)
        measures = [
            _divided(measure, common if place in problem.counting else _exponent(measure))
            for place, measure in enumerate(problem.measures)
        ]
        return cls(replace(problem, measures=tuple(measures)), common)

    def cost(self, cost: float) -> float:
        """Returns a cost of the scaled problem in the unit of the given one; infinite where no number is so large."""
        try:
            return math.ldexp(cost, 2 * self.exponent)
        except OverflowError:
            return math.copysign(math.inf, cost)


def _measure_has_room(measure: NeuronMeasure) -> bool:
    structure = measure.structure
    # A neuron is a row of the support: a small one beside large ones is told from others like it. A structure is
    # compared as a whole.
    if structure is not None and not _has_room(structure.reshape(1, -1)):
        return False
    rows = measure.deferred
    if rows is None:
        return _has_room(measure.support)
    # The norm of a row lies between its largest number and that times the root of its length.
    norms, length = rows.squared_norms().sqrt(), max(rows.shape[1], 1) ** 0.5
    return _in_range(norms, length) or _in_range(rows.row_maxima())


def _has_room(tensor: Float[Tensor, "n d"]) -> bool:
    """Whether every row that is not zero has its largest number in the range whose squares are kept."""
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    return _in_range(torch.linalg.vector_norm(tensor.detach(), ord=math.inf, dim=-1))


def _in_range(largest: Float[Tensor, " n"], excess: float = 1.0) -> bool:
    """Whether numbers, at most `excess` times too large, are in the range whose squares are kept."""
    room = _DOUBLE if largest.dtype == torch.float64 else _SINGLE
    if excess > 1:
        return not bool(((largest > room) | (largest < excess / room)).any())
    return not bool(((largest > room) | ((largest > 0) & (largest < 1 / room))).any())


def _exponent(measure: NeuronMeasure) -> int:
    tensors = [tensor for tensor in (measure.support, measure.structure) if tensor is not None and tensor.numel()]
    largest = max((float(tensor.detach().abs().max()) for tensor in tensors), default=0.0)
    return math.frexp(largest)[1] - 1 if 0 < largest < math.inf else 0


def _divided(measure: NeuronMeasure, exponent: int) -> NeuronMeasure:
    structure = measure.structure
    return NeuronMeasure(
        _scaled_down(measure.support, exponent),
        uniform_mass(measure.size, _in_double(measure.mass)) if measure.is_uniform else _in_double(measure.mass),
        None if structure is None else _scaled_down(structure, exponent),
        measure.signs,
    )


def _scaled_down(tensor: Tensor, exponent: int) -> Tensor:
    half = exponent // 2
    # In two steps: the power itself may lie outside the range.
    return _in_double(tensor) * 2.0**-half * 2.0 ** (half - exponent)


def _in_double(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.device.type == "mps" else tensor.double()
