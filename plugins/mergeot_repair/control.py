"""The controls of a repair: what it does must leave the predictions of an untouched source as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mergekit_ot import DataError, RepairContext, axis_of_classes, outputs_of

# Share of the predictions that the procedure may change in an untouched source.
_TOLERATED = 0.02
# Share of the calibration inputs whose prediction an honest re-estimate of the statistics may change there.
_TOLERATED_STATISTICS = 0.10
# Means of the calibration data that are so many deviations from those that a source remembers belong to other data.
SHIFTED = 0.5
# A few batches tell whether the procedure is sound; the control must not cost as much as the repair. They are too few
# for a choice among strengths of a pull, so none is made.
_BATCHES = 2
# So many inputs tell what the statistics of the data are.
_INPUTS_FOR_STATISTICS = 1_000


def check_control(
    context: RepairContext, name: str, procedure: Callable[[RepairContext], Mapping[str, Tensor]]
) -> None:
    """Repairs the heaviest source as if it were a fusion of itself, and compares its predictions.

    Raises:
        DataError: More of them change than noise explains.
    """
    heaviest = max(range(len(context.model_weights)), key=context.model_weights.__getitem__)
    source, aligned = context.sources[heaviest], context.aligned[heaviest]
    if not all(couplings[heaviest].is_exact for couplings in source.alignment.couplings.values()):
        return
    batches = list(context.batches)[:_BATCHES]
    control = replace(
        context,
        fused=aligned,
        aligned=(aligned,),
        model_weights=(1.0,),
        sources=(source,),
        batches=batches,
        progress=None,
        note=None,
    )
    changed, total = changed_predictions(context.instance(aligned), context.instance(procedure(control)), batches)
    if changed > max(_TOLERATED * total, 1):
        raise DataError(
            f"Repair '{name}' would change {100 * changed / total:.0f} % of an untouched source's predictions, so it "
            "cannot be trusted with these networks and data. Give inputs with the sources' own preprocessing and more "
            "of them (--calibration-size), or take --repair none."
        )


def check_statistics(context: RepairContext, name: str, least_shift: float = 0.0) -> None:
    """Re-estimates the running statistics of the heaviest source's BatchNorms, and compares its predictions.

    These statistics are what the source knows of its own data: where those of the calibration data are others, the data
    have another preprocessing, or are too few.

    Args:
        context: Of the repair.
        name: Of the repair, for the message.
        least_shift: Deviations by which half the means of a BatchNorm must differ, too: a repair that fits maps can
            do with sources whose statistics were never right, as long as the data are theirs.

    Raises:
        DataError: More predictions change than an honest re-estimate explains.
    """
    heaviest = max(range(len(context.aligned)), key=context.model_weights.__getitem__)
    state = _untouched(context, heaviest)
    before, own = context.instance(state), context.instance(state)
    if not norms_of(own):
        return
    batches = list(_first(context.batches, _INPUTS_FOR_STATISTICS))
    after = context.instance(reestimated(own, batches))
    if _shift(before, after) < least_shift:
        return
    changed, total = changed_predictions(before, after, batches)
    if changed > _TOLERATED_STATISTICS * total:
        raise DataError(
            f"Repair '{name}' would change {100 * changed / total:.0f} % of an untouched source's predictions: the "
            "calibration data do not look like what the sources were trained on. Give inputs with the sources' own "
            "preprocessing, and more of them (--calibration-size)."
        )


def _untouched(context: RepairContext, number: int) -> Mapping[str, Tensor]:
    """Returns a source as the fused network holds it; as it was given where its neurons were blended on the way."""
    aligned, source = context.aligned[number], context.sources[number]
    if all(couplings[number].is_exact for couplings in source.alignment.couplings.values()):
        return aligned
    own = dict(source.state)
    is_alike = all(name in own and own[name].shape == value.shape for name, value in aligned.items())
    return {name: own[name] for name in aligned} if is_alike else aligned


def _first(batches: Iterable[tuple[Tensor, ...]], most: int) -> Iterator[tuple[Tensor, ...]]:
    """Yields batches until they hold `most` inputs."""
    count = 0
    for inputs in batches:
        yield inputs
        count += len(inputs[0])
        if count >= most:
            return


def _shift(before: nn.Module, after: nn.Module) -> float:
    """Returns how many deviations half the means of a BatchNorm moved by, in the one where that is most."""
    shifts = [0.0]
    for one, other in zip(norms_of(before), norms_of(after), strict=True):
        if one.running_mean is not None and one.running_var is not None and other.running_mean is not None:
            deviations = (other.running_mean - one.running_mean) * (one.running_var + one.eps).rsqrt()
            shifts.append(float(deviations.abs().median()))
    return max(shifts)


def norms_of(model: nn.Module) -> list[_BatchNorm]:
    """Returns the BatchNorms of a model that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def reestimated(model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Returns the state of `model`, which is changed, after its statistics were averaged over all batches."""
    norms = norms_of(model)
    counts = {id(norm): norm.num_batches_tracked for norm in norms}
    kept = {key: None if count is None else count.clone() for key, count in counts.items()}
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for inputs in batches:
            model(*inputs)
    for norm in norms:
        # The count is the sources' training history, not ours.
        if norm.num_batches_tracked is not None and kept[id(norm)] is not None:
            norm.num_batches_tracked.copy_(kept[id(norm)])  # type: ignore[arg-type]
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def changed_predictions(before: nn.Module, after: nn.Module, batches: Iterable[Sequence[Tensor]]) -> tuple[int, int]:
    """Returns how many predictions differ between two models, and of how many; (0, 0) where they predict no classes."""
    changed = total = 0
    for inputs in batches:
        # Of several outputs none says which holds the classes.
        scores, *more = outputs_of(before, inputs) or [None]
        if scores is None or more or scores.ndim < 2:
            return 0, 0
        axis = axis_of_classes(scores.shape, inputs)
        classes, others = scores.argmax(axis), outputs_of(after, inputs)[0].argmax(axis)
        changed += int((classes != others).sum())
        total += classes.numel()
    return changed, total
