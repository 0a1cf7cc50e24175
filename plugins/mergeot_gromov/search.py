"""How a coupling is looked for: Frank-Wolfe, Bregman alternating projected gradient (BAPG), iterated assignments.

Which finds what: BAPG finds a planted match through the most noise, Frank-Wolfe the lower objective on unrelated
networks; so BAPG is tried first, and Frank-Wolfe from several starts where what it found is not clear.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergeot_gromov.pairwise import FusedGromov
from mergeot_gromov.points import Point, Slope

_BAPG_STEPS = 50
# The plan's sum of squares, over that of a permutation: above the first, BAPG goes on only where a step adds the second
# at least; above the last, the vertex next to the plan is the one that it would end at.
_NEARLY, _GAINS, _DECIDED = 0.5, 0.01, 0.99
# A Frank-Wolfe step that gains less than this many times the rounding error no longer changes the vertex next to it.
_ROUNDED = 30
# Numbers at most in a matrix of several points; beyond, products take the time, and side by side saves none.
_NUMBERS = 2**18
# Among so few neurons BAPG wanders on from vertex to vertex, and ends at better ones than where it first stays.
_WANDERS = 32
# A match is clear where this part of the neurons are each other's first choice; below a size, chance makes it so.
_MUTUAL, _LEAST_SIZE = 0.95, 16
# A regularisation below this changes nothing, and steps divided by it leave the range of single precision.
_LEAST = 1e-12
# How far from the uniform coupling random starts lie: at a vertex, the first gradient would say little.
_RANDOM_STEP = 0.3


def frank_wolfe(problem: FusedGromov, start: Point, max_steps: int) -> Point:
    """Returns where Frank-Wolfe with exact line search ends; the objective never rises on the way."""
    return frank_wolfe_from(problem, [start], max_steps)[0]


def frank_wolfe_from(
    problem: FusedGromov, starts: Sequence[Point], max_steps: int, is_rounded: bool = False
) -> list[Point]:
    """Returns where Frank-Wolfe ends from each of several starts, which go side by side: small groups take no longer.

    Args:
        problem: The objective.
        starts: Any points.
        max_steps: Steps at most of each.
        is_rounded: Whether a permutation near the end is what is asked for, so that the last digits do not matter.
    """
    least = problem.slack * (_ROUNDED if is_rounded else 1)
    ends = list(starts)
    running = list(range(len(starts)))
    points, couplings = Point.stacked(starts), [start.coupling for start in starts]
    for _ in range(max_steps):
        corners, vertices = problem.corners(problem.gradient(points), couplings)
        lines = zip(*(values.tolist() for values in problem.line(points, vertices)), strict=True)
        steps = [(_best_step(slope, curvature), slope, curvature) for slope, curvature in lines]
        goes_on = [slope * step + curvature * step**2 < -least for step, slope, curvature in steps]
        for place, run in enumerate(running):
            if not goes_on[place]:
                ends[run] = points.single(place, couplings[place])
        kept = [place for place, goes in enumerate(goes_on) if goes]
        if not kept:
            return ends
        if len(kept) < len(running):
            points, vertices = points.chosen(kept), vertices.chosen(kept)
        running = [running[place] for place in kept]
        sizes = [steps[place][0] for place in kept]
        couplings = [corners[place] if step == 1.0 else None for place, step in zip(kept, sizes, strict=True)]
        points = points.mixed(vertices, torch.tensor(sizes).to(points.plan)[:, None, None])
    for place, run in enumerate(running):
        ends[run] = points.single(place, couplings[place])
    return ends


def side_by_side(problem: FusedGromov) -> int:
    """Returns how many starts go side by side: as many as are no more work for the memory than one of a wide group."""
    return max(1, _NUMBERS // max(problem.linear.even.numel(), 1))


def polish(problem: FusedGromov, start: Point, max_steps: int, needs_vertex: bool) -> Point:
    """Returns the end of iterated assignments: each solves the problem linearised at the one before.

    Args:
        problem: The objective.
        start: Any point; it is itself a candidate unless `needs_vertex`.
        max_steps: Assignments at most.
        needs_vertex: Whether the result must be a permutation.
    """
    point = problem.corner(problem.gradient(start), start.coupling)
    value = problem.objective(point)
    if not needs_vertex or start.coupling is not None:
        at_start = problem.objective(start)
        if at_start <= value + problem.slack:
            point, value = start, at_start
    for _ in range(max_steps):
        if point is start:
            break
        end = problem.corner(problem.gradient(point), point.coupling)
        lower = problem.objective(end)
        if lower >= value - problem.slack:
            break
        point, value = end, lower
    return point


def alternating_gradient(problem: FusedGromov, epsilon: float) -> Point:
    """Returns the result of BAPG (arXiv:2303.06595), from the independent coupling.

    Row and column marginals are enforced in turn; `epsilon` is relative to a typical entry of the gradient. The
    plan's column marginals are exact, its row marginals only at a fixed point: polish it before use.
    """
    log_target = problem.target_mass.clamp_min(1e-30).log()[:, None]
    log_source = problem.source_mass.clamp_min(1e-30).log()
    logarithm = (log_target + log_source)[None]
    if problem.has_signs:
        # One layer of the plan for each sign.
        logarithm = logarithm.repeat(2, 1, 1) - math.log(2.0)
    rate = 1.0 / (max(epsilon, _LEAST) * max(problem.scale, 1e-30))
    point, decided = problem.uniform(), 0.0
    for _ in range(_BAPG_STEPS):
        logarithm = logarithm - rate * _layers(problem.gradient(point))
        logarithm = logarithm - torch.logsumexp(logarithm, (0, 2), keepdim=True) + log_target
        point = _between(problem, logarithm.exp())
        logarithm = logarithm - rate * _layers(problem.gradient(point))
        logarithm = logarithm - torch.logsumexp(logarithm, (0, 1), keepdim=True) + log_source
        point = _between(problem, logarithm.exp())
        before, decided = decided, float(point.plan.square().sum()) * min(point.plan.shape)
        settles = decided > _NEARLY and decided - before < _GAINS and min(point.plan.shape) > _WANDERS
        if decided > _DECIDED or settles:
            break
    return point


def is_clear(problem: FusedGromov, point: Point) -> bool:
    """Whether a permutation is one that no other search would improve on: a planted one, or nearly.

    So it is where, beside the others, nearly every neuron and its partner are each other's first choice. At the optimum
    of unrelated networks, where neurons compete for their partners, that holds for three in four at most.
    """
    coupling = point.coupling
    if coupling is None or not coupling.is_permutation or coupling.target_size < _LEAST_SIZE:
        return False
    slope = problem.gradient(point)
    cost = slope.even if slope.odd is None else slope.even - slope.odd.abs()
    partners, places = coupling.partners(), torch.arange(coupling.target_size, device=cost.device)
    is_mutual = (cost.argmin(1) == partners) & (cost.argmin(0)[partners] == places)
    return float(is_mutual.float().mean()) >= _MUTUAL


def _layers(slope: Slope) -> Float[Tensor, "signs m n"]:
    if slope.odd is None:
        return slope.even[None]
    return torch.stack([slope.even + slope.odd, slope.even - slope.odd])


def _between(problem: FusedGromov, layers: Float[Tensor, "signs m n"]) -> Point:
    if layers.shape[0] == 1:
        return problem.between(layers[0], layers[0])
    return problem.between(layers[0] + layers[1], layers[0] - layers[1])


def starting_points(problem: FusedGromov, random_starts: int = 0) -> Iterator[Point]:
    """Yields the uniform coupling, that of the supports alone, that of the sorted structure profiles, random ones.

    Random ones lie between the uniform coupling and a random vertex. Symmetric structure (distances) has few optima,
    and gets none of them.
    """
    uniform = problem.uniform()
    yield uniform
    if bool(problem.linear.even.any()):
        yield problem.corner(problem.linear)
    yield problem.corner(problem.linear.plus(problem.alpha * _profile_cost(problem)))
    generator = torch.Generator().manual_seed(0)
    for _ in range(0 if problem.is_symmetric else random_starts):
        even, odd = (torch.randn(uniform.plan.shape, generator=generator).to(uniform.plan) for _ in range(2))
        yield uniform.mixed(problem.corner(Slope(even, odd if problem.has_signs else None)), _RANDOM_STEP)


def _profile_cost(problem: FusedGromov) -> Float[Tensor, "m n"]:
    """Returns the least structure cost each pair of neurons could have: sorted rows and columns compared.

    The third lower bound of Gromov-Wasserstein; for unequal sizes on a common grid of quantiles. Numbers that change
    sign are compared by their size.
    """
    grid = max(problem.linear.even.shape)
    cost = torch.zeros_like(problem.linear.even)
    densities = [problem.target_density, problem.source_density]
    if problem.signs is not None:
        is_odd = (problem.signs.rows | problem.signs.readers)[:, None, None].to(cost.device)
        densities = [torch.where(is_odd, density.abs(), density) for density in densities]
    # Symmetric structure says twice the same.
    axes, parts = ((2,), 2) if problem.is_symmetric else ((1, 2), 1)
    for axis in axes:
        target, source = (_quantiles(density.sort(axis).values.movedim(axis, 2), grid) for density in densities)
        for target_profile, source_profile in zip(target, source, strict=True):
            cost += torch.cdist(target_profile, source_profile).square() * (parts / grid)
    return cost


def _quantiles(ordered: Float[Tensor, "s n n"], grid: int) -> Float[Tensor, "s n q"]:
    size = ordered.shape[2]
    # the middle of each of `grid` equal parts of the mass, as a place among `size` equal masses
    places = (2 * torch.arange(grid, device=ordered.device) + 1) * size // (2 * grid)
    return ordered[:, :, places]


def _best_step(slope: float, curvature: float) -> float:
    if curvature > 0:
        return min(1.0, max(0.0, -slope / (2 * curvature)))
    return 1.0 if slope + curvature < 0 else 0.0
