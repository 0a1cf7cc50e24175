"""The straight path between two models: linear interpolation, and the barrier on the way."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NotRequired, TypedDict

import torch
from torch import Tensor, nn

from mergekit_ot.errors import ArchitectureError, DataError
from mergekit_ot.progress import Progress
from mergekit_ot.scoring.evaluation import Data, State, score_states

Repair = Callable[[State, float], State]


class BarrierCurve(TypedDict):
    """The path between two models: one entry per point, and the height of its highest place.

    Attributes:
        t: From 0 (the first model) to 1.
        loss: Mean loss at each t.
        accuracy: In percent, at each t; None for float targets.
        loss_barrier: ``max_t [L(t) - (1 - t) L(0) - t L(1)]``.
        error_barrier: The same for the error, in percent points; None for float targets.
        perplexity: The exponential of the loss, at each t; there for targets that are tokens only.
    """

    t: list[float]
    loss: list[float]
    accuracy: list[float] | None
    loss_barrier: float
    error_barrier: float | None
    perplexity: NotRequired[list[float]]


def interpolate(state_a: State, state_b: State, t: float) -> dict[str, Tensor]:
    """Returns ``(1 - t) a + t b`` tensor by tensor; integer tensors (counters) come from the first.

    Raises:
        ArchitectureError: The states differ in names or shapes.

    Example:
        >>> interpolate({"w": torch.zeros(2)}, {"w": torch.ones(2)}, 0.25)["w"]
        tensor([0.2500, 0.2500])
    """
    check_same_shapes(state_a, state_b)
    return {
        name: torch.lerp(value, state_b[name].to(value), t) if value.is_floating_point() else value.clone()
        for name, value in state_a.items()
    }


def check_same_shapes(state_a: State, state_b: State) -> None:
    """Checks that two states have the same tensors.

    Raises:
        ArchitectureError: They differ in names or shapes.
    """
    for name in [*state_a, *state_b]:
        if name not in state_a or name not in state_b or state_a[name].shape != state_b[name].shape:
            shapes = [tuple(state[name].shape) if name in state else "missing" for state in (state_a, state_b)]
            raise ArchitectureError(
                f"Tensor '{name}' is {shapes[0]} in the first model and {shapes[1]} in the second: only models of one "
                "architecture and width can be interpolated. Align or fuse them first."
            )


def barrier(
    model: nn.Module,
    state_a: State,
    state_b: State,
    data: Data,
    points: int = 25,
    device: str = "cpu",
    *,
    repair: Repair | None = None,
    progress: Progress | None = None,
) -> BarrierCurve:
    """Evaluates the straight path between two states and the barrier on it.

    The barrier is ``max_t [L(t) - (1 - t) L(0) - t L(1)]``, for the loss and for the error in percent points
    (arXiv:2210.06671, section on linear mode connectivity); it is at least 0.

    Args:
        model: A module of the architecture; its own weights are neither used nor changed.
        state_a: The state at t = 0.
        state_b: The state at t = 1.
        data: (inputs, targets) batches that can be read more than once, or a callable that returns them.
        points: Number of points, both ends included.
        device: ``cpu``, ``cuda`` or ``auto``.
        repair: Called with the interpolated state and its t, returns the state that is evaluated in its place. The two
            ends are trained models: they are evaluated as they are.
        progress: Called with (points done, points in all, what is done).

    Raises:
        DataError: Fewer than two points, or unusable data.
        ArchitectureError: The states differ, or the model cannot take the inputs.

    Example:
        >>> net, batch = nn.Linear(2, 2), (torch.randn(8, 2), torch.randint(2, (8,)))
        >>> curve = barrier(net, net.state_dict(), net.state_dict(), [batch], points=3)
        >>> curve["t"], curve["loss_barrier"]
        ([0.0, 0.5, 1.0], 0.0)
    """
    if points < 2:
        raise DataError(f"A path of {points} points has no two ends: use at least 2, such as 25.")
    check_same_shapes(state_a, state_b)
    steps = [index / (points - 1) for index in range(points)]
    states = _path(state_a, state_b, steps, repair, progress)
    scores = score_states(model, states, data, device, count=points, progress=progress, task="points on the path")
    losses = [score.loss for score in scores]
    accuracies = [score.accuracy for score in scores if score.accuracy is not None]
    curve = BarrierCurve(
        t=steps,
        loss=losses,
        accuracy=accuracies or None,
        loss_barrier=_height(steps, losses),
        error_barrier=_height(steps, [100 - accuracy for accuracy in accuracies]) if accuracies else None,
    )
    perplexities = [score.perplexity for score in scores if score.perplexity is not None]
    if perplexities:
        curve["perplexity"] = perplexities
    return curve


def _path(
    state_a: State, state_b: State, steps: Sequence[float], repair: Repair | None, progress: Progress | None
) -> Iterator[State]:
    for number, t in enumerate(steps):
        state = interpolate(state_a, state_b, t)
        if repair is None or not 0 < t < 1:
            yield state
            continue
        if progress is not None:
            progress(number, len(steps), f"repair at t = {t:.2f}")
        # Evaluation, which asks for the states, has gradients off; a repair is free to use them.
        with torch.enable_grad():
            state = repair(state, t)
        yield state


def _height(steps: list[float], values: list[float]) -> float:
    heights = [value - (1 - t) * values[0] - t * values[-1] for t, value in zip(steps, values, strict=True)]
    return max(heights) if all(map(math.isfinite, heights)) else math.nan
