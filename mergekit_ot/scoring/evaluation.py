"""Metrics of models: loss and accuracy on data, of modules or of many states of one module."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mergekit_ot.errors import ArchitectureError, DataError
from mergekit_ot.progress import Progress
from mergekit_ot.scoring.batches import taken
from mergekit_ot.scoring.devices import choose_device, has_double
from mergekit_ot.scoring.inputs import check_inputs
from mergekit_ot.scoring.metrics import Metric
from mergekit_ot.scoring.tally import Evaluation, Tally
from mergekit_ot.threads import multiplications_of_run, threads_for

State = Mapping[str, Tensor]
Data = Iterable[Any] | Callable[[], Iterable[Any]]

# States that share a pass over the data: at most so many, so that progress is seen, with at most so many entries.
_STATES_AT_ONCE = 32
_ENTRIES_AT_ONCE = 500_000_000


@overload
def evaluate(
    model_or_models: nn.Module,
    data: Data,
    device: str = "cpu",
    *,
    metrics: Sequence[Metric] = (),
    progress: Progress | None = None,
) -> Evaluation: ...


@overload
def evaluate(
    model_or_models: Sequence[nn.Module],
    data: Data,
    device: str = "cpu",
    *,
    metrics: Sequence[Metric] = (),
    progress: Progress | None = None,
) -> tuple[Evaluation, ...]: ...


def evaluate(
    model_or_models: nn.Module | Sequence[nn.Module],
    data: Data,
    device: str = "cpu",
    *,
    metrics: Sequence[Metric] = (),
    progress: Progress | None = None,
) -> Evaluation | tuple[Evaluation, ...]:
    """Scores one or more models in a single pass over the data, in evaluation mode and without gradients.

    Args:
        model_or_models: A module, or several that see the same batches.
        data: (inputs, targets) batches or dictionaries, or a callable that returns them.
        device: ``cpu``, ``cuda``, ``mps`` or ``auto``. The models come back to where they were.
        metrics: What is measured besides.
        progress: Called with (batches done, 0, what is done): how many there are is not known.

    Returns:
        One `Evaluation`, or one per model.

    Raises:
        DataError: The data is empty, an input is NaN or infinite, or targets do not fit the outputs.
        ArchitectureError: A model cannot take the inputs.

    Example:
        >>> perfect = nn.Identity()
        >>> evaluate(perfect, [(torch.eye(3) * 100, torch.arange(3))]).accuracy
        100.0
    """
    if isinstance(model_or_models, nn.Module):
        return _evaluate_all([model_or_models], data, device, metrics, progress)[0]
    return _evaluate_all(list(model_or_models), data, device, metrics, progress)


def _evaluate_all(
    models: list[nn.Module], data: Data, device: str, metrics: Sequence[Metric], progress: Progress | None
) -> tuple[Evaluation, ...]:
    notify = progress or _no_progress
    place = choose_device(device)
    tallies = [Tally.of(metrics) for _ in models]
    with _evaluating(models, place), torch.no_grad():
        for number, (inputs, targets) in enumerate(_checked(data, models[0]), 1):
            moved, goal = _to(inputs, place), targets.to(place if has_double(place) else "cpu")
            for model, tally in zip(models, tallies, strict=True):
                tally.add(_in_reach(run_model(model, moved)), goal)
            notify(number, 0, f"batch {number}")
    return tuple(tally.result() for tally in tallies)


@contextlib.contextmanager
def _evaluating(models: list[nn.Module], place: torch.device) -> Iterator[None]:
    """Puts models into evaluation mode on a device, and back to where and how they were."""
    homes = [_home(model, place) for model in models]
    modes = [_modes(model) for model in models]
    try:
        for model in models:
            model.to(place).eval()
        yield
    finally:
        for model, home, mode in zip(models, homes, modes, strict=True):
            model.to(home)
            for module, is_training in mode.items():
                module.training = is_training


def _home(model: nn.Module, default: torch.device) -> torch.device:
    return next((tensor.device for tensor in _tensors(model)), default)


def _modes(model: nn.Module) -> dict[nn.Module, bool]:
    return {module: module.training for module in model.modules()}


def score_states(
    model: nn.Module,
    states: Iterable[State],
    data: Data,
    device: str = "cpu",
    *,
    count: int,
    progress: Progress | None = None,
    task: str = "states",
) -> list[Evaluation]:
    """Scores many states of one module: several in each pass over the data, in bounded memory, the module built once.

    Reading the data is often dearer than a small network's forward pass, so states share a pass. (`torch.func.vmap`
    over stacked states gains nothing here on a CPU: perceptrons run as fast, convolutions three times as slow.)

    Args:
        model: A module of the architecture; its own weights are neither used nor changed.
        states: Taken one by one, when there is room for them.
        data: (inputs, targets) batches that can be read more than once, or a callable that returns them.
        device: ``cpu``, ``cuda`` or ``auto``.
        count: How many states there are, for the progress.
        progress: Called with (states done, states in all, what is done).
        task: What is done, in words.

    Returns:
        One `Evaluation` per state.

    Raises:
        DataError: The data is empty, an input is NaN or infinite, or targets do not fit the outputs.
        ArchitectureError: The model cannot take the inputs.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> batch = torch.randn(8, 2), torch.randint(2, (8,))
        >>> len(score_states(net, [net.state_dict(), net.state_dict()], [batch], count=2))
        2
    """
    place, waiting = choose_device(device), iter(states)
    notify = progress or _no_progress
    if not callable(data) and iter(data) is data:
        data = list(data)
    entries = sum(tensor.numel() for tensor in _tensors(model))
    together = max(1, min(_STATES_AT_ONCE, _ENTRIES_AT_ONCE // max(1, entries)))
    scores: list[Evaluation] = []
    with _evaluating([model], place), torch.no_grad():
        while group := list(islice(waiting, together)):
            moved = [_state_to(state, place) for state in group]
            tallies = [Tally() for _ in moved]
            for number, (inputs, targets) in enumerate(_checked(data, model), 1):
                there, wanted = _to(inputs, place), targets.to(place if has_double(place) else "cpu")
                for state, tally in zip(moved, tallies, strict=True):
                    tally.add(_in_reach(run_model(model, there, state)), wanted)
                notify(len(scores), count, f"{task}, {len(moved)} of them on batch {number}")
            scores += [tally.result() for tally in tallies]
    notify(len(scores), count, task)
    return scores


def run_model(model: nn.Module, inputs: Any, state: State | None = None) -> Tensor:
    """Runs a module, with its own state or with another, and returns its first output tensor.

    Raises:
        ArchitectureError: The module cannot take the inputs, or returns no tensor.
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    entries = sum(tensor.numel() for tensor in _tensors(model))
    try:
        with threads_for(multiplications_of_run(entries, arguments)):
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


def _batches(data: Data) -> Iterable[Any]:
    return data() if callable(data) else data


def _checked(data: Data, model: nn.Module) -> Iterable[tuple[Any, Tensor]]:
    """Yields the batches, whose inputs and targets must be finite: one that is not would be all of the mean loss."""
    first = 0
    for number, (inputs, targets) in enumerate(taken(_batches(data), model)):
        if targets is None:
            raise DataError(
                f"Batch {number} of the data (counted from 0) has inputs and no targets, and a score compares outputs "
                "with targets. Give (inputs, targets), or a dictionary whose targets --label-key names. (To align and "
                "repair, inputs alone will do.)"
            )
        check_inputs(inputs, "data", batch=number, first=first)
        check_inputs(targets, "data", batch=number, first=first, what="target")
        first += _rows(inputs)
        yield inputs, targets


def _rows(inputs: Any) -> int:
    part = inputs[0] if isinstance(inputs, tuple | list) else inputs
    return int(part.shape[0]) if isinstance(part, Tensor) and part.ndim else 1


def _no_progress(done: int, total: int, what: str) -> None:
    """Reports nothing."""


def _state_to(state: State, place: torch.device) -> dict[str, Tensor]:
    return {name: _moved(value, place) for name, value in state.items()}


def _to(inputs: Any, place: torch.device) -> Any:
    return tuple(_moved(part, place) for part in inputs) if isinstance(inputs, tuple) else _moved(inputs, place)


def _moved(tensor: Tensor, place: torch.device) -> Tensor:
    is_narrowed = tensor.dtype is torch.float64 and not has_double(place)
    return tensor.to(place, torch.float32) if is_narrowed else tensor.to(place)


def _in_reach(outputs: Tensor) -> Tensor:
    """Returns outputs where sums are made in double precision."""
    return outputs if has_double(outputs.device) else outputs.cpu()


def _tensors(model: nn.Module) -> Iterable[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
