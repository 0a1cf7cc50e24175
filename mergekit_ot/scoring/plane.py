"""The loss landscape on the plane through two models and the aligned copy of one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_ot.errors import DataError
from mergekit_ot.progress import Progress
from mergekit_ot.scoring.evaluation import Data, Evaluation, State, score_states
from mergekit_ot.scoring.path import check_same_shapes

# Below this fraction of the distance from A to B, what lies beside the line from A to B is rounding.
_FLAT = 1e-4
# No running variance falls below this fraction of the least of the three models'.
_LEAST_VARIANCE = 0.01
_VARIANCE = "running_var"
# How much of A, B and aligned B makes each of the models that are shown.
_PLACED = {
    "A": (1.0, 0.0, 0.0),
    "B": (0.0, 1.0, 0.0),
    "aligned B": (0.0, 0.0, 1.0),
    "fused": (0.5, 0.0, 0.5),
}


class PlacedModel(TypedDict):
    """A model on a plane: where it is, in units of distance, and what it scores."""

    x: float
    y: float
    loss: float
    accuracy: float | None


class LossPlane(TypedDict):
    """The plane through models A, B and aligned B: scores on a grid.

    Attributes:
        x: Distance from A along the direction to B, one per column, rising.
        y: Distance from the line through A and B, on the side of aligned B, one per row, rising.
        loss: Mean loss, row by row (``loss[row][column]``).
        accuracy: In percent, row by row; None for float targets.
        models: ``A``, ``B``, ``aligned B`` and ``fused`` (the midpoint of A and aligned B), each exactly as it is.
        clamped: Points of the grid where extrapolated running variances had to be raised to stay positive.
    """

    x: list[float]
    y: list[float]
    loss: list[list[float]]
    accuracy: list[list[float]] | None
    models: dict[str, PlacedModel]
    clamped: int


@dataclass(frozen=True)
class PlaneFrame:
    """Coordinates on the plane through three states, with A as the origin and B on the x axis.

    Attributes:
        state_a: The origin.
        state_b: At ``(distance, 0)``.
        aligned_b: At ``(across, up)`` with `up` > 0.
        distance: From A to B.
        across: How far aligned B is from A, in the direction of B.
        up: How far aligned B is from the line through A and B.
    """

    state_a: State
    state_b: State
    aligned_b: State
    distance: float
    across: float
    up: float

    def coefficients(self, points: Float[Tensor, "points 2"]) -> Float[Tensor, "points 3"]:
        """Returns how much of A, B and aligned B make the state at each point (x, y); each row sums to one."""
        of_aligned = points[:, 1] / self.up
        of_b = (points[:, 0] - of_aligned * self.across) / self.distance
        return torch.stack([1 - of_b - of_aligned, of_b, of_aligned], 1)

    def state(self, coefficients: Float[Tensor, " 3"]) -> tuple[dict[str, Tensor], bool]:
        """Returns the sum of the three states with these coefficients, and whether a running variance was raised.

        Integer tensors come from A. A running variance that extrapolation makes negative, or nearly so, is raised to a
        hundredth of the least among the three models.
        """
        shares, mixed, is_clamped = coefficients.tolist(), {}, False
        for name, value in self.state_a.items():
            if not value.is_floating_point():
                mixed[name] = value.clone()
                continue
            tensors = [value, self.state_b[name].to(value), self.aligned_b[name].to(value)]
            total = torch.zeros_like(value)
            for share, tensor in zip(shares, tensors, strict=True):
                total = total + share * tensor
            if name.rpartition(".")[2] == _VARIANCE:
                least = _LEAST_VARIANCE * torch.stack(tensors).amin(0)
                is_clamped = is_clamped or bool((total < least).any())
                total = torch.maximum(total, least)
            mixed[name] = total
        return mixed, is_clamped


def plane_frame(model: nn.Module, state_a: State, state_b: State, aligned_b: State) -> PlaneFrame:
    """Returns the plane through three states: u = B - A, and v = aligned B - A made orthogonal to it.

    Distances are Euclidean and count the parameters, each of tied ones once; buffers (running statistics) follow the
    parameters and have no length.

    Raises:
        ArchitectureError: The states differ in names or shapes.
        DataError: The three lie on a line, or A and B are the same.

    Example:
        >>> net = nn.Linear(1, 2, bias=False)
        >>> a, b, aligned = ({"weight": torch.tensor([[p], [q]])} for p, q in ((0.0, 0.0), (3.0, 0.0), (1.0, 2.0)))
        >>> frame = plane_frame(net, a, b, aligned)
        >>> frame.distance, frame.across, frame.up
        (3.0, 1.0, 2.0)
    """
    check_same_shapes(state_a, state_b)
    check_same_shapes(state_a, aligned_b)
    names = [name for name, _ in model.named_parameters() if name in state_a and state_a[name].is_floating_point()]
    towards_b, towards_aligned = (_difference(state_a, state, names) for state in (state_b, aligned_b))
    distance = float(towards_b.norm())
    across = float(towards_aligned @ towards_b) / distance if distance else 0.0
    up = float((towards_aligned - across / distance * towards_b).norm()) if distance else 0.0
    _check_plane(distance, up, float(towards_aligned.norm()))
    return PlaneFrame(state_a, state_b, aligned_b, distance, across, up)


def _difference(state_a: State, state_b: State, names: Sequence[str]) -> Float[Tensor, " parameters"]:
    return torch.cat([(state_b[name].double() - state_a[name].double()).reshape(-1) for name in names])


def _check_plane(distance: float, up: float, moved: float) -> None:
    """Checks that three models lie on no line.

    Args:
        distance: From A to B.
        up: How far aligned B is from the line through A and B.
        moved: How far aligned B is from A.

    Raises:
        DataError: They do; the message says why.
    """
    is_line = distance == 0 or up <= _FLAT * distance
    if not is_line:
        return
    why = "aligning B moved it along the line only, or not at all"
    if distance == 0:
        why = "A and B are equal"
    elif moved <= _FLAT * distance:
        why = "B is A with its neurons in another order, so aligned B is A"
    raise DataError(
        f"A, B and aligned B lie on one line, and no plane is theirs alone: {why}. Measure the barrier without a "
        "plane, or align with another solver."
    )


def plane(
    model: nn.Module,
    state_a: State,
    state_b: State,
    aligned_b: State,
    data: Data,
    points: int = 21,
    margin: float = 0.25,
    device: str = "cpu",
) -> LossPlane:
    """Evaluates loss and accuracy on the plane through A, B and aligned B.

    A is the origin, u = (B - A) / |B - A| the x axis, and v the part of aligned B - A orthogonal to it, scaled to
    length one, the y axis (arXiv:1802.10026; arXiv:2210.06671, section on linear mode connectivity). Running statistics
    of BatchNorm are interpolated as the parameters are; `clamped` counts where a variance had to be kept positive.

    Args:
        model: A module of the architecture; its own weights are neither used nor changed.
        state_a: The origin.
        state_b: The other model, in its own neuron order.
        aligned_b: The other model in the neuron order of A: `FusionResult.aligned_state`.
        data: (inputs, targets) batches that can be read more than once, or a callable that returns them.
        points: Points of the grid per side.
        margin: What is added on each side of the three models, as a fraction of their extent.
        device: ``cpu``, ``cuda`` or ``auto``.

    Raises:
        DataError: Fewer than two points per side, a negative margin, no plane through the three, or unusable data.
        ArchitectureError: The states differ, or the model cannot take the inputs.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(1, 2, bias=False)
        >>> a, b, aligned = ({"weight": torch.tensor([[p], [q]])} for p, q in ((0.0, 0.0), (3.0, 0.0), (1.0, 2.0)))
        >>> scored = plane(net, a, b, aligned, [(torch.ones(1, 1), torch.tensor([0]))], points=3, margin=0.0)
        >>> scored["x"], scored["y"], scored["models"]["fused"]["x"]
        ([0.0, 1.5, 3.0], [0.0, 1.0, 2.0], 0.5)
    """
    check_grid(points, margin)
    frame = plane_frame(model, state_a, state_b, aligned_b)
    return score_plane(frame, model, data, points, margin, device)


def score_plane(
    frame: PlaneFrame,
    model: nn.Module,
    data: Data,
    points: int = 21,
    margin: float = 0.25,
    device: str = "cpu",
    *,
    progress: Progress | None = None,
) -> LossPlane:
    """Evaluates loss and accuracy on a plane that was laid through three models: see `plane`.

    Args:
        frame: The plane, of `plane_frame`.
        model: A module of the architecture; its own weights are neither used nor changed.
        data: (inputs, targets) batches that can be read more than once, or a callable that returns them.
        points: Points of the grid per side.
        margin: What is added on each side of the three models, as a fraction of their extent.
        device: ``cpu``, ``cuda`` or ``auto``.
        progress: Called with (points done, points in all, what is done).

    Raises:
        DataError: Fewer than two points per side, a negative margin, or unusable data.
        ArchitectureError: The model cannot take the inputs.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(1, 2, bias=False)
        >>> a, b, aligned = ({"weight": torch.tensor([[p], [q]])} for p, q in ((0.0, 0.0), (3.0, 0.0), (1.0, 2.0)))
        >>> frame, done = plane_frame(net, a, b, aligned), []
        >>> data = [(torch.ones(1, 1), torch.tensor([0]))]
        >>> scored = score_plane(frame, net, data, 3, 0.0, progress=lambda *seen: done.append(seen))
        >>> scored["x"], done[-1]
        ([0.0, 1.5, 3.0], (13, 13, 'points on the plane'))
    """
    check_grid(points, margin)
    across = _axis(min(0.0, frame.across), max(frame.distance, frame.across), points, margin)
    up = _axis(0.0, frame.up, points, margin)
    grid = torch.cartesian_prod(up, across).flip(1)  # [points * points, 2], row by row
    shares = torch.cat([torch.tensor(list(_PLACED.values()), dtype=grid.dtype), frame.coefficients(grid)])
    clamped: list[bool] = []
    states = _states(frame, shares, clamped)
    task = "points on the plane"
    scores = score_states(model, states, data, device, count=len(shares), progress=progress, task=task)
    own, rest = scores[: len(_PLACED)], scores[len(_PLACED) :]
    accuracies = [score.accuracy for score in rest if score.accuracy is not None]
    return LossPlane(
        x=across.tolist(),
        y=up.tolist(),
        loss=_in_rows([score.loss for score in rest], points),
        accuracy=_in_rows(accuracies, points) if accuracies else None,
        models=_models(frame, own),
        clamped=sum(clamped[len(_PLACED) :]),
    )


def _in_rows(values: Sequence[float], length: int) -> list[list[float]]:
    return [list(values[start : start + length]) for start in range(0, len(values), length)]


def check_grid(points: int, margin: float = 0.0) -> None:
    """Checks that a grid has an extent.

    Raises:
        DataError: It has not.
    """
    if points < 2:
        raise DataError(f"A plane of {points} points per side has no extent: use at least 2, such as 21.")
    if not 0 <= margin < float("inf"):
        raise DataError(f"The margin {margin:g} is no fraction of the plane's extent: use at least 0, such as 0.25.")


def _axis(low: float, high: float, points: int, margin: float) -> Float[Tensor, " points"]:
    beyond = margin * (high - low)
    return torch.linspace(low - beyond, high + beyond, points, dtype=torch.float64)


def _states(frame: PlaneFrame, shares: Float[Tensor, "points 3"], clamped: list[bool]) -> Iterator[State]:
    for row in shares:
        state, is_clamped = frame.state(row)
        clamped.append(is_clamped)
        yield state


def _models(frame: PlaneFrame, scores: list[Evaluation]) -> dict[str, PlacedModel]:
    models: dict[str, PlacedModel] = {}
    for (name, (_, of_b, of_aligned)), score in zip(_PLACED.items(), scores, strict=True):
        x, y = of_b * frame.distance + of_aligned * frame.across, of_aligned * frame.up
        models[name] = PlacedModel(x=x, y=y, loss=score.loss, accuracy=score.accuracy)
    return models
