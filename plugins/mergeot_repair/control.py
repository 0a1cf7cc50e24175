"""The control of a repair: the same procedure on an untouched source must leave its predictions as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from mergekit_ot import DataError, RepairContext, outputs_of

# Share of the predictions that the procedure may change in an untouched source.
_TOLERATED = 0.02
# A few batches tell whether the procedure is sound; the control must not cost as much as the repair.
_BATCHES = 4


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


def changed_predictions(before: nn.Module, after: nn.Module, batches: Iterable[Sequence[Tensor]]) -> tuple[int, int]:
    """Returns how many predictions differ between two models, and of how many; (0, 0) where they predict no classes."""
    changed = total = 0
    for inputs in batches:
        # Of several outputs none says which holds the classes.
        scores, *more = outputs_of(before, inputs) or [None]
        if scores is None or more or scores.ndim < 2:
            return 0, 0
        classes, others = scores.argmax(1), outputs_of(after, inputs)[0].argmax(1)
        changed += int((classes != others).sum())
        total += classes.numel()
    return changed, total
