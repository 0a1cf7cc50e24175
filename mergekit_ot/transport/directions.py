"""Exact couplings where neurons may be negated or rotated, and not only reordered."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.errors import SolverError
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.ground_cost import at_least_single, couple, ground_cost
from mergekit_ot.transport.invertible import InvertibleMap
from mergekit_ot.transport.measure import FIXED_MEAN, ORTHOGONAL, ROTARY, NeuronMeasure, Signs, uniform_mass

# The singular vector of the mean gets so many times the largest singular value.
_MEAN = 10.0


def couple_rows(target: Float[Tensor, "m d"], measure: NeuronMeasure, prefer: Coupling | None = None) -> Coupling:
    """Returns the coupling of a source with a support that leaves least apart, among all that its group allows.

    An exact transport plan where neurons are only reordered (`couple`), an assignment with signs where they may be
    negated, the polar factor of the rows' inner products where they may be rotated (the orthogonal Procrustes problem).

    Args:
        target: Support of the fused group.
        measure: The source's neurons.
        prefer: A coupling to keep where it is as good.

    Raises:
        SolverError: Rotations are allowed, and the sizes differ.

    Example:
        >>> columns = torch.ones(2, dtype=torch.bool)
        >>> none = torch.zeros(0, dtype=torch.bool)
        >>> rows = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
        >>> measure = NeuronMeasure.uniform(rows, signs=Signs(columns, none, none, ORTHOGONAL))
        >>> couple_rows(torch.eye(2), measure).move_support(rows, measure.signs).tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    signs = measure.signs
    if signs is not None and signs.may_rotate:
        target, source = (at_least_single(rows) for rows in (target, measure.support))
        return rotation_between(target[:, signs.columns], source[:, signs.columns], signs.symmetry)
    mass = uniform_mass(target.shape[0], measure.mass)
    if signs is None:
        return couple(ground_cost(target, measure.support), mass, measure.mass, prefer)
    cost, sign = _signed_cost(at_least_single(target), at_least_single(measure.support), signs)
    return couple(cost, mass, measure.mass, prefer).with_signs(sign)


def rotation_between(target: Float[Tensor, "m d"], source: Float[Tensor, "n d"], symmetry: str) -> InvertibleMap:
    """Returns the rotation of a symmetry under which a source's rows come nearest to others.

    Where there are more fused neurons, it leads into their space by orthonormal columns, as long per neuron as before.

    Args:
        target: Rows of the fused neurons.
        source: Rows of the source's; what reads neurons is in densities.
        symmetry: Which rotations are allowed: ``orthogonal``, ``orthogonal with fixed mean`` (the sum of all neurons
            stays), or ``rotary`` (planes of neurons i and i + n/2).

    Raises:
        SolverError: There are fewer fused neurons, or another number of planes.

    Example:
        >>> turned = rotation_between(torch.eye(2), torch.tensor([[0.0, 1.0], [1.0, 0.0]]), ORTHOGONAL)
        >>> turned.matrix.abs().tolist()
        [[0.0, 1.0], [1.0, 0.0]]
    """
    sizes = target.shape[0], source.shape[0]
    if sizes[0] < sizes[1] or (symmetry == ROTARY and sizes[0] != sizes[1]):
        raise SolverError(
            f"Neurons can be rotated onto each other where there are as many of them, or more in the fused network, "
            f"not {sizes[1]} of a source onto {sizes[0]}. Take --solver-option symmetry=permutation, or a target as "
            "wide as the widest source."
        )
    products = target.double() @ source.double().T
    matrix = rotations_of(products[None], symmetry)[0] * (sizes[0] / max(sizes[1], 1)) ** 0.5
    return InvertibleMap(matrix.to(target.dtype))


def rotations_of(products: Float[Tensor, "p m n"], symmetry: str) -> Float[Tensor, "p m n"]:
    """Returns, for each matrix of inner products (fused, source), the rotation with which it has the largest trace.

    With more rows than columns it has orthonormal columns.

    Args:
        products: The matrices.
        symmetry: Which rotations are allowed.

    Example:
        >>> rotations_of(torch.tensor([[[0.0, 2.0], [-2.0, 0.0]]]), ROTARY)[0].tolist()
        [[0.0, 1.0], [-1.0, 0.0]]
    """
    if symmetry == ROTARY:
        return _planes(products)
    if symmetry == FIXED_MEAN:
        # The mean of the neurons stays, so only what is orthogonal to it may turn.
        entry = (products.shape[-2] * products.shape[-1]) ** -0.5
        products = products - products.mean(-1, keepdim=True)
        products = products - products.mean(-2, keepdim=True)
        largest = torch.linalg.matrix_norm(products, ord=2)[:, None, None]
        products = products + _MEAN * torch.where(largest > 0, largest, 1.0) * torch.full_like(products, entry)
    left, _, right = torch.linalg.svd(products, full_matrices=False)
    return left @ right


def gains_of(products: Float[Tensor, "p n n"], symmetry: str) -> Float[Tensor, " p"]:
    """Returns the trace of each matrix of inner products with its best rotation: the nuclear norm, or that of planes.

    Example:
        >>> gains_of(torch.tensor([[[0.0, 2.0], [-2.0, 0.0]]]), ORTHOGONAL).tolist()
        [4.0]
    """
    if symmetry == ORTHOGONAL:
        return torch.linalg.svdvals(products).sum(-1)
    return (rotations_of(products, symmetry) * products).sum((-2, -1))


def _planes(products: Float[Tensor, "p n n"]) -> Float[Tensor, "p n n"]:
    """Returns the rotations of the planes of neurons i and i + n/2: the phase of a complex inner product each."""
    half = products.shape[-1] // 2
    one, other = torch.arange(half), torch.arange(half, 2 * half)
    even = products[:, one, one] + products[:, other, other]
    odd = products[:, other, one] - products[:, one, other]
    length = torch.hypot(even, odd)
    is_silent = length <= 0
    cosine = torch.where(is_silent, 1.0, even / length.clamp_min(torch.finfo(length.dtype).tiny))
    sine = torch.where(is_silent, 0.0, odd / length.clamp_min(torch.finfo(length.dtype).tiny))
    rotations = torch.zeros_like(products)
    rotations[:, one, one], rotations[:, other, other] = cosine, cosine
    rotations[:, other, one], rotations[:, one, other] = sine, -sine
    return rotations


def _signed_cost(
    target: Float[Tensor, "m d"], source: Float[Tensor, "n d"], signs: Signs
) -> tuple[Float[Tensor, "m n"], Float[Tensor, "m n"]]:
    """Returns the squared distance of each pair of neurons at the better sign, and that sign."""
    product = target[:, signs.columns] @ source[:, signs.columns].T
    # With the sign of the product, the distance is shorter by what the product is negative.
    cost = ground_cost(target, source) - 4 * (-product).clamp_min(0)
    return cost.clamp_min(0), torch.where(product < 0, -1.0, 1.0).to(product)
