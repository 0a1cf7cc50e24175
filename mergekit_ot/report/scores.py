"""What a report measures: the sources, their naive average, the fused model, the ensemble, and the path."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from mergekit_ot.errors import DataError, MergeotError
from mergekit_ot.fusion.result import FusionResult
from mergekit_ot.progress import Notify, Progress
from mergekit_ot.scoring.evaluation import Evaluation, evaluate, run_model
from mergekit_ot.scoring.path import BarrierCurve, barrier
from mergekit_ot.sources.datasets import DataSource

State = Mapping[str, Tensor]

PATH_POINTS = 25
NO_DATA = "Nothing was scored: no data was given. Pass --data SPEC, such as --data mnist.npz, and fuse again."


@dataclass(frozen=True)
class Scores:
    """What was measured on the data; where something was not, a sentence says why.

    Attributes:
        sources: One per source.
        mean: Of the sources, with the model weights.
        naive: The average of the sources as they are, with the model weights.
        fused: The fused model.
        ensemble: The mean of the sources' probabilities, with the model weights.
        curves: ``naive`` and ``aligned``: the paths between two sources of equal widths.
        missing: Why there are no scores at all.
        naive_missing: Why there is no naive average.
        path_missing: Why there is no path.
        data: The data SPEC.
        seconds: What measuring took.
    """

    sources: tuple[Evaluation, ...] = ()
    mean: Evaluation | None = None
    naive: Evaluation | None = None
    fused: Evaluation | None = None
    ensemble: Evaluation | None = None
    curves: Mapping[str, BarrierCurve] = field(default_factory=dict)
    missing: str = ""
    naive_missing: str = ""
    path_missing: str = ""
    data: str = ""
    seconds: float = 0.0

    @property
    def rows(self) -> list[tuple[str, Evaluation]]:
        """What was scored besides the sources, by name, in the order of a table."""
        named = {
            "mean of the sources": self.mean if len(self.sources) > 1 else None,
            "naive average": self.naive,
            "fused": self.fused,
            "ensemble": self.ensemble,
        }
        return [(name, score) for name, score in named.items() if score is not None]


class Ensemble(nn.Module):
    """The mean of several networks' predictions.

    For classes it is the logarithm of the mean probabilities, taken over `axis`; without an axis the mean output.
    """

    def __init__(self, members: Sequence[nn.Module], model_weights: Sequence[float], axis: int | None) -> None:
        super().__init__()
        chosen = [(member, weight) for member, weight in zip(members, model_weights, strict=True) if weight > 0]
        self.members = nn.ModuleList(member for member, _ in chosen)
        self.model_weights = [weight for _, weight in chosen]
        self.axis = axis

    def forward(self, *inputs: Tensor) -> Tensor:
        """Returns log-probabilities, or mean outputs."""
        outputs = [run_model(member, inputs) for member in self.members]
        if self.axis is None:
            return torch.stack([w * out for w, out in zip(self.model_weights, outputs, strict=True)]).sum(0)
        logs = [out.log_softmax(self.axis) + math.log(w) for w, out in zip(self.model_weights, outputs, strict=True)]
        return torch.stack(logs).logsumexp(0)


def score_fusion(
    result: FusionResult,
    model_weights: Sequence[float],
    data: Callable[[], DataSource],
    device: str,
    notify: Notify,
    progress: Progress | None = None,
) -> Scores:
    """Scores everything that a report compares; what goes wrong becomes a sentence of the report, never an error.

    Args:
        result: The fusion.
        model_weights: One per source.
        data: Returns (inputs, targets) batches; targets are read here, and only here.
        device: ``cpu``, ``cuda`` or ``auto``.
        notify: Told beforehand what will be computed.
        progress: Called with (points done, points in all, what is done).
    """
    started = time.perf_counter()
    try:
        source = data()
        scores = _scored(result, model_weights, source, device, notify)
    except Exception as error:
        scores = Scores(missing=f"Nothing was scored: {_sentence(error)}")
        notify(f"warning: {scores.missing}")
        return scores
    try:
        scores = _with_path(scores, result, source, device, notify, progress, time.perf_counter() - started)
    except Exception as error:
        scores = replace(scores, path_missing=f"The path could not be evaluated: {_sentence(error)}")
        notify(f"warning: {scores.path_missing}")
    return replace(scores, data=source.name, seconds=time.perf_counter() - started)


def _sentence(error: Exception) -> str:
    # Data and networks are the user's own code, so anything can come out of them.
    shown = str(error) if isinstance(error, MergeotError) else f"{type(error).__name__}: {error}"
    return shown.rstrip(". ") + "."


def _scored(
    result: FusionResult, model_weights: Sequence[float], data: DataSource, device: str, notify: Notify
) -> Scores:
    members = [source.instance() for source in result.sources]
    states = [dict(member.state_dict()) for member in members]
    difference = shape_difference(states)
    models: dict[str, nn.Module] = {"fused": result.model()}
    why = ""
    if len(members) < 2:
        why = "There is no naive average of one source."
    elif difference:
        why = f"There is no naive average: {difference}."
    else:
        models["naive"] = result.sources[0].instance(naive_average(states, model_weights))
    # Heads of different classes have no mean.
    if len(members) > 1 and not result.alignment.uncompared:
        models["ensemble"] = Ensemble(members, model_weights, _class_axis(members[0], data))
    number = "one source" if len(members) == 1 else f"{len(members)} sources"
    notify(f"Report: scoring {number} and what they make ({', '.join(models)}) on '{data.name}' …")
    each = evaluate([*members, *models.values()], data, device)
    own, named = each[: len(members)], dict(zip(models, each[len(members) :], strict=True))
    return Scores(
        own,
        mean_score(own, model_weights),
        named.get("naive"),
        named["fused"],
        named.get("ensemble"),
        naive_missing=why,
    )


def _with_path(
    scores: Scores,
    result: FusionResult,
    data: DataSource,
    device: str,
    notify: Notify,
    progress: Progress | None,
    seconds: float,
) -> Scores:
    if len(result.sources) != 2:
        number = len(result.sources)
        fused = "one was" if number == 1 else f"{number} were"
        return replace(scores, path_missing=f"A path joins two sources; {fused} fused.")
    model = result.target.make()
    first, second = (dict(source.instance().state_dict()) for source in result.sources)
    difference = shape_difference([first, second, dict(model.state_dict())], "the fused model")
    if difference:
        why = f"There is no straight path between networks of unequal widths: {difference}."
        return replace(scores, path_missing=why)
    # Scoring ran two sources twice (alone and in the ensemble), the naive average and the fused model.
    expected = seconds / 6 * 2 * PATH_POINTS
    notify(
        f"Report: the path between the sources, as they are and aligned, at {PATH_POINTS} points each"
        f"{_duration(expected)} …"
    )
    pairs = {"naive": (first, second), "aligned": (result.aligned_state(0), result.aligned_state(1))}
    modules = {"naive": model, "aligned": result.aligned_module()}
    curves = {
        name: barrier(modules[name], start, end, data, PATH_POINTS, device, progress=progress)
        for name, (start, end) in pairs.items()
    }
    return replace(scores, curves=curves)


def _duration(seconds: float) -> str:
    if seconds < 20:
        return ""
    shown = f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
    return f", about {shown} (fewer inputs take less: limit=N in the data's query)"


def _class_axis(model: nn.Module, data: DataSource) -> int | None:
    """Returns the axis of the classes: the last or, as in torch's losses, axis 1; None for float targets."""
    inputs, targets = next(iter(data))
    if targets is None:
        raise DataError("The data have inputs and no targets, and a score compares outputs with targets.")
    if targets.is_floating_point():
        return None
    with torch.no_grad():
        outputs = run_model(model, inputs)
    return -1 if outputs.shape[:-1] == targets.shape else 1


def mean_score(scores: Sequence[Evaluation], model_weights: Sequence[float]) -> Evaluation:
    """Returns the mean of scores, with the model weights."""
    pairs = list(zip(model_weights, scores, strict=True))
    accuracies = [weight * score.accuracy for weight, score in pairs if score.accuracy is not None]
    return Evaluation(
        math.fsum(weight * score.loss for weight, score in pairs if weight > 0),
        math.fsum(accuracies) if len(accuracies) == len(pairs) else None,
        scores[0].count,
        all(score.is_of_tokens for score in scores),
    )


def naive_average(states: Sequence[State], model_weights: Sequence[float]) -> dict[str, Tensor]:
    """Returns the mean of states of equal shapes, tensor by tensor; integer tensors come from the first.

    Args:
        states: One per source.
        model_weights: One per source.
    """
    averaged = {}
    for name, value in states[0].items():
        if value.is_floating_point():
            weighted = [weight * state[name].double() for weight, state in zip(model_weights, states, strict=True)]
            averaged[name] = torch.stack(weighted).sum(0).to(value.dtype)
        else:
            averaged[name] = value.clone()
    return averaged


def shape_difference(states: Sequence[State], last: str = "") -> str:
    """Returns where the first difference in names or shapes is, in words; empty where there is none.

    Args:
        states: One per source.
        last: What the last one is called, where it is no source.
    """
    for number, state in enumerate(states[1:], start=2):
        who = last if last and number == len(states) else f"source {number}"
        for name in [*states[0], *state]:
            shapes = _shape(states[0].get(name)), _shape(state.get(name))
            if shapes[0] != shapes[1]:
                return f"'{name}' is {shapes[0]} in source 1 and {shapes[1]} in {who}"
    return ""


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else "×".join(map(str, tensor.shape)) or "a single number"
