"""Metrics of models, linear interpolation between two, and the barrier on the way."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, overload

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from mergekit_ot.errors import ArchitectureError, DataError, RecipeError

State = Mapping[str, Tensor]
Data = Iterable[Any] | Callable[[], Iterable[Any]]

# Entries of interpolated states kept in memory together while a path is evaluated.
_HELD_AT_ONCE = 500_000_000


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on data.

    Attributes:
        loss: Mean cross-entropy (the same for logits and log-softmax outputs); mean squared error for float targets.
        accuracy: Percent of targets that are the most likely class; None for float targets.
        count: Number of targets.
    """

    loss: float
    accuracy: float | None
    count: int


class BarrierCurve(TypedDict):
    """The path between two models: one entry per point, and the height of its highest place."""

    t: list[float]
    loss: list[float]
    accuracy: list[float] | None
    loss_barrier: float
    error_barrier: float | None


@dataclass
class _Tally:
    loss: float = 0.0
    correct: int = 0
    count: int = 0
    is_classification: bool = True

    def add(self, outputs: Tensor, targets: Tensor) -> None:
        if targets.is_floating_point():
            self.is_classification = False
            if outputs.shape != targets.shape and outputs.numel() == targets.numel():
                outputs = outputs.reshape(targets.shape)
            if outputs.shape != targets.shape:
                raise DataError(
                    f"Outputs have shape {tuple(outputs.shape)}, float targets {tuple(targets.shape)}: for a squared "
                    "error they must agree. Class targets must be integers."
                )
            count = targets.shape[0] if targets.dim() else 1
            self.loss += (outputs.double() - targets.double()).square().mean().item() * count
            self.count += count
            return
        logits, classes = _flat_classes(outputs, targets.long())
        self.loss += nn.functional.cross_entropy(logits.double(), classes, reduction="sum").item()
        self.correct += int((logits.argmax(1) == classes).sum())
        self.count += classes.numel()

    def result(self) -> Evaluation:
        if self.count == 0:
            raise DataError("The data has no batches: nothing was evaluated.")
        accuracy = 100 * self.correct / self.count if self.is_classification else None
        return Evaluation(self.loss / self.count, accuracy, self.count)


@overload
def evaluate(model_or_models: nn.Module, data: Data, device: str = "cpu") -> Evaluation: ...


@overload
def evaluate(model_or_models: Sequence[nn.Module], data: Data, device: str = "cpu") -> tuple[Evaluation, ...]: ...


def evaluate(
    model_or_models: nn.Module | Sequence[nn.Module], data: Data, device: str = "cpu"
) -> Evaluation | tuple[Evaluation, ...]:
    """Scores one or more models in a single pass over the data, in evaluation mode and without gradients.

    Args:
        model_or_models: A module, or several that see the same batches.
        data: (inputs, targets) batches, or a callable that returns them.
        device: ``cpu``, ``cuda`` or ``auto``. The models come back to where they were.

    Returns:
        One `Evaluation`, or one per model.

    Raises:
        DataError: The data is empty, or targets do not fit the outputs.
        ArchitectureError: A model cannot take the inputs.

    Example:
        >>> perfect = nn.Identity()
        >>> evaluate(perfect, [(torch.eye(3) * 100, torch.arange(3))]).accuracy
        100.0
    """
    if isinstance(model_or_models, nn.Module):
        return _evaluate_all([model_or_models], data, device)[0]
    return _evaluate_all(list(model_or_models), data, device)


def _evaluate_all(models: list[nn.Module], data: Data, device: str) -> tuple[Evaluation, ...]:
    place = choose_device(device)
    tallies = [_Tally() for _ in models]
    with _evaluating(models, place), torch.no_grad():
        for inputs, targets in _batches(data):
            moved, goal = _to(inputs, place), targets.to(place)
            for model, tally in zip(models, tallies, strict=True):
                tally.add(run_model(model, moved), goal)
    return tuple(tally.result() for tally in tallies)


@contextlib.contextmanager
def _evaluating(models: list[nn.Module], place: torch.device) -> Iterator[None]:
    """Puts models into evaluation mode on a device, and back to where and how they were."""
    homes = [next((tensor.device for tensor in _tensors(model)), place) for model in models]
    modes = [{module: module.training for module in model.modules()} for model in models]
    try:
        for model in models:
            model.to(place).eval()
        yield
    finally:
        for model, home, mode in zip(models, homes, modes, strict=True):
            model.to(home)
            for module, is_training in mode.items():
                module.training = is_training


def interpolate(state_a: State, state_b: State, t: float) -> dict[str, Tensor]:
    """Returns ``(1 - t) a + t b`` tensor by tensor; integer tensors (counters) come from the first.

    Raises:
        ArchitectureError: The states differ in names or shapes.

    Example:
        >>> interpolate({"w": torch.zeros(2)}, {"w": torch.ones(2)}, 0.25)["w"]
        tensor([0.2500, 0.2500])
    """
    for name in [*state_a, *state_b]:
        if name not in state_a or name not in state_b or state_a[name].shape != state_b[name].shape:
            shapes = [tuple(state[name].shape) if name in state else "missing" for state in (state_a, state_b)]
            raise ArchitectureError(
                f"Tensor '{name}' is {shapes[0]} in the first model and {shapes[1]} in the second: only models of one "
                "architecture and width can be interpolated. Align or fuse them first."
            )
    return {
        name: torch.lerp(value, state_b[name].to(value), t) if value.is_floating_point() else value.clone()
        for name, value in state_a.items()
    }


def barrier(
    model: nn.Module, state_a: State, state_b: State, data: Data, points: int = 11, device: str = "cpu"
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
        raise DataError(f"A path of {points} points has no two ends: use at least 2, such as 11.")
    place = choose_device(device)
    if not callable(data) and iter(data) is data:
        data = list(data)
    steps = [index / (points - 1) for index in range(points)]
    held = sum(value.numel() for value in state_a.values()) * points
    # Reading the data is often dearer than a small network's forward pass; a large one is held once at a time.
    groups = [steps] if held <= _HELD_AT_ONCE else [[t] for t in steps]
    scores = [
        score
        for group in groups
        for score in _score_states(model, [interpolate(state_a, state_b, t) for t in group], data, place)
    ]
    losses = [score.loss for score in scores]
    accuracies = [score.accuracy for score in scores if score.accuracy is not None]
    return BarrierCurve(
        t=steps,
        loss=losses,
        accuracy=accuracies or None,
        loss_barrier=_height(steps, losses),
        error_barrier=_height(steps, [100 - accuracy for accuracy in accuracies]) if accuracies else None,
    )


def _score_states(model: nn.Module, states: list[State], data: Data, place: torch.device) -> list[Evaluation]:
    """Returns the evaluation of every state, in one pass over the data."""
    moved = [{name: value.to(place) for name, value in state.items()} for state in states]
    tallies = [_Tally() for _ in states]
    with _evaluating([model], place), torch.no_grad():
        for inputs, targets in _batches(data):
            there, wanted = _to(inputs, place), targets.to(place)
            for state, tally in zip(moved, tallies, strict=True):
                tally.add(run_model(model, there, state), wanted)
    return [tally.result() for tally in tallies]


def _height(steps: list[float], values: list[float]) -> float:
    heights = [value - (1 - t) * values[0] - t * values[-1] for t, value in zip(steps, values, strict=True)]
    return max(heights) if all(map(math.isfinite, heights)) else math.nan


def run_model(model: nn.Module, inputs: Any, state: State | None = None) -> Tensor:
    """Runs a module, with its own state or with another, and returns its first output tensor.

    Raises:
        ArchitectureError: The module cannot take the inputs, or returns no tensor.
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    try:
        if state is None:
            outputs = model(*arguments)
        else:
            outputs = functional_call(model, dict(state), arguments, tie_weights=False)
    except Exception as failure:
        shapes = ", ".join(f"{tuple(part.shape)} {str(part.dtype).removeprefix('torch.')}" for part in arguments)
        raise ArchitectureError(
            f"{type(model).__name__} cannot take inputs of shape {shapes}: {type(failure).__name__}: {failure}. "
            "Check that the data and the architecture belong together."
        ) from failure
    if isinstance(outputs, Mapping):
        outputs = outputs.get("logits", next(iter(outputs.values()), None))
    while isinstance(outputs, tuple | list) and outputs:
        outputs = outputs[0]
    if not isinstance(outputs, Tensor):
        raise ArchitectureError(f"{type(model).__name__} returned a {type(outputs).__name__}, not a tensor of outputs.")
    return outputs


def choose_device(name: str) -> torch.device:
    """Returns the device for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        RecipeError: The device does not exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"Unknown device '{name}'. Use auto, cpu or cuda.") from error
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"Unknown device '{name}'. Use auto, cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError("This machine has no CUDA device. Use --device cpu or --device auto.")
    return device


def _flat_classes(outputs: Tensor, targets: Tensor) -> tuple[Float[Tensor, "n classes"], Tensor]:
    """Returns one row of logits per target: classes stand on the last axis or, as in torch's losses, on axis 1."""
    if outputs.dim() == targets.dim() + 1 and outputs.shape[:-1] == targets.shape:
        logits = outputs.reshape(-1, outputs.shape[-1])
    elif outputs.dim() == targets.dim() + 1 and (outputs.shape[0], *outputs.shape[2:]) == tuple(targets.shape):
        logits = outputs.movedim(1, -1).reshape(-1, outputs.shape[1])
    else:
        raise DataError(
            f"Outputs have shape {tuple(outputs.shape)}, class targets {tuple(targets.shape)}: "
            "expected one row of logits per target."
        )
    classes = targets.reshape(-1)
    wrong = classes[(classes < 0) | (classes >= logits.shape[1])]
    if wrong.numel():
        raise DataError(
            f"Target {int(wrong[0])} is no class of a model with {logits.shape[1]} outputs. Check the data's labels."
        )
    return logits, classes


def _batches(data: Data) -> Iterable[tuple[Any, Tensor]]:
    return data() if callable(data) else data


def _to(inputs: Any, place: torch.device) -> Any:
    return tuple(part.to(place) for part in inputs) if isinstance(inputs, tuple) else inputs.to(place)


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
