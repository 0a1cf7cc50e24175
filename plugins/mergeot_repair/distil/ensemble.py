"""What the sources make together, and how far a network that is trained is from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mergekit_ot import (
    DataError,
    Disagreement,
    RepairContext,
    axis_of_classes,
    ensemble_outputs,
    mean_probabilities,
    outputs_of,
    probabilities_of,
    tensors_of,
)

Batch = tuple[Tensor, ...]
# Sources whose answers have that probability, in the mean, are taken for classifiers.
_LEAST_CERTAINTY = 0.5
# So many inputs tell whether results are classes.
_TELLING = 1_000
# Bytes of the ensemble's results that are kept; beyond it the sources run at every step.
_MOST_KEPT = 1_000_000_000
_NO_GOAL = (
    "Repair 'distil' has nothing to train towards: no source with a weight has results of the fused network's sizes. "
    "Take --repair refit."
)


def makes_classes(context: RepairContext) -> bool:
    """Returns whether the sources' results are classes: predictions of tokens, or answers that are sure.

    One tensor with an axis of classes, the same in all sources and the fused network, can be that.
    """
    used = [number for number, weight in enumerate(context.model_weights) if weight > 0]
    models = [context.sources[number].instance() for number in used]
    fused, found, count = context.instance(context.fused), Disagreement(len(used)), 0
    for inputs in context.batches:
        outputs = [outputs_of(model, inputs) for model in (*models, fused)]
        if any(len(each) != 1 or each[0].shape != outputs[0][0].shape for each in outputs):
            return False
        shape = outputs[0][0].shape
        axis = axis_of_classes(shape, inputs) if len(shape) >= 2 else 0
        if len(shape) < 2 or shape[axis] < 2 or not all(bool(each[0].isfinite().all()) for each in outputs):
            return False
        if any(not each.is_floating_point() and tuple(each.shape) == tuple(shape[:-1]) for each in inputs):
            return True  # what is predicted for each token is a token, however unsure
        found.add([probabilities_of(of_model, axis) for (of_model,) in outputs[:-1]])
        count += len(inputs[0])
        if count >= _TELLING:
            break
    return found.certainty >= _LEAST_CERTAINTY


@dataclass(frozen=True)
class Results:
    """How a network's results are read: as probabilities of classes, or as numbers.

    Attributes:
        axis: Where the classes stand; None where results are numbers.
        are_probabilities: Whether the fused network hands out probabilities as they are, not logits.
        scale: By which squared errors are divided: how much the ensemble's numbers vary.
    """

    axis: int | None
    are_probabilities: bool = False
    scale: float = 1.0

    def losses(self, outputs: Sequence[Float[Tensor, ...]], goals: Sequence[Float[Tensor, ...]]) -> Float[Tensor, ""]:
        """Returns the mean divergence of a network's results from the ensemble's, to be differentiated.

        Args:
            outputs: Of the network, as it hands them out.
            goals: Of the ensemble: probabilities with the classes on the last axis, or numbers.
        """
        if self.axis is None:
            # An output that is numbers counts for all that it holds, as where a repair is judged.
            missed = [(own - goal).square().sum() for own, goal in zip(outputs, goals, strict=True)]
            return torch.stack(missed).sum() / (self.scale * len(goals[0]))
        (own,), (goal,) = outputs, goals
        own, tiny = own.movedim(self.axis, -1), torch.finfo(own.dtype).tiny
        logs = own.clamp_min(tiny).log() if self.are_probabilities else own.log_softmax(-1)
        return (goal * (goal.clamp_min(tiny).log() - logs)).sum() / (goal.numel() / goal.shape[-1])


class Ensemble:
    """The sources together, on inputs that are told by number.

    Args:
        context: Of the repair.
        batches: The inputs.
        is_of_classes: Whether results are classes, to be compared as probabilities.
        device: Where to compute.
    """

    def __init__(self, context: RepairContext, batches: Sequence[Batch], is_of_classes: bool, device: str) -> None:
        self.batches, self.device, self.size = batches, device, len(batches[0][0])
        used = [number for number, weight in enumerate(context.model_weights) if weight > 0]
        self.weights = [context.model_weights[number] for number in used]
        self.models = [placed(context.sources[number].instance(), device) for number in used]
        fused = placed(context.instance(context.fused), device)
        self.like = [each.to("meta") for each in run(fused, self.inputs(torch.arange(self.size)))]
        self.axis = axis_of_classes(self.like[0].shape, batches[0]) if is_of_classes else None
        self.kept: list[list[Tensor]] | None = None
        first = self.goals(torch.arange(self.size))
        has_a_row_for_each = all(goal.ndim and len(goal) == self.size for goal in first)
        needed = len(batches) * sum(goal.numel() * goal.element_size() for goal in first)
        if has_a_row_for_each and needed <= _MOST_KEPT:
            places = torch.arange(len(self)).split(self.size)
            self.kept = [[goal.cpu() for goal in self._made(numbers)] for numbers in places]
        self.results = self._results(fused, first)

    def __len__(self) -> int:
        """Returns how many inputs there are."""
        return self.size * len(self.batches)

    def batch(self, numbers: Int[Tensor, " n"]) -> Batch:
        """Returns inputs by their numbers, where they were given."""
        return tuple(self._gathered(self.batches, numbers))

    def inputs(self, numbers: Int[Tensor, " n"]) -> Batch:
        """Returns inputs by their numbers, where it is computed."""
        return tuple(part.to(self.device) for part in self.batch(numbers))

    def goals(self, numbers: Int[Tensor, " n"]) -> list[Tensor]:
        """Returns what the ensemble makes of inputs: probabilities, classes last, or its mean outputs."""
        if self.kept is None:
            return self._made(numbers)
        return [part.to(self.device) for part in self._gathered(self.kept, numbers)]

    def _gathered(self, parts: Sequence[Sequence[Tensor]], numbers: Int[Tensor, " n"]) -> list[Tensor]:
        places = [divmod(int(number), self.size) for number in numbers]
        return [torch.stack([parts[batch][column][row] for batch, row in places]) for column in range(len(parts[0]))]

    def _made(self, numbers: Int[Tensor, " n"]) -> list[Tensor]:
        inputs = self.inputs(numbers)
        with torch.no_grad():
            outputs = [run(model, inputs) for model in self.models]
        if self.axis is not None:
            probabilities = [probabilities_of(each, self.axis) for (each,) in outputs]
            rows = mean_probabilities(probabilities, self.weights)
            shape = outputs[0][0].movedim(self.axis, -1).shape
            return [rows.reshape(shape).to(outputs[0][0].dtype)]
        goals = [
            ensemble_outputs([of_model[place] for of_model in outputs], self.weights, like)
            for place, like in enumerate(self.like)
        ]
        if any(goal is None for goal in goals):
            raise DataError(_NO_GOAL)
        return goals  # type: ignore[return-value]

    def _results(self, fused: nn.Module, goals: Sequence[Tensor]) -> Results:
        """Returns how results are read, from the first batch."""
        if self.axis is None:
            around = [float((goal - goal.mean(0)).square().sum()) / len(goal) for goal in goals if goal.ndim]
            return Results(None, scale=max(sum(around), 1e-12))
        with torch.no_grad():
            (own,) = run(fused, self.inputs(torch.arange(self.size)))
        rows = own.movedim(self.axis, -1)
        are_probabilities = bool((rows >= 0).all()) and bool(((rows.sum(-1) - 1).abs() <= 1e-3).all())
        return Results(self.axis, are_probabilities)


def placed(model: nn.Module, device: str) -> nn.Module:
    """Returns a network in evaluation mode, on a device, with the numbers that training needs."""
    is_half = any(value.dtype in (torch.float16, torch.bfloat16) for value in model.parameters())
    if is_half:
        model.float()
    model.to(device)
    for module in model.modules():
        # The kernels of a GPU differentiate recurrent layers in training mode only, which differs in dropout alone.
        if isinstance(module, nn.RNNBase) and device != "cpu":
            module.dropout = 0.0
            module.train()
    return model


def run(model: nn.Module, inputs: Batch) -> list[Tensor]:
    """Returns the numbers that a network hands out; inputs are given in the number type of its weights."""
    kinds = {value.dtype for value in model.parameters() if value.is_floating_point()}
    if len(kinds) == 1:
        (kind,) = kinds
        inputs = tuple(part.to(kind) if part.is_floating_point() else part for part in inputs)
    held = [each for each in tensors_of(model(*inputs)) if each.is_floating_point() or each.is_complex()]
    return [torch.view_as_real(each) if each.is_complex() else each for each in held]
