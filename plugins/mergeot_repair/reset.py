"""Re-estimates BatchNorm statistics on calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mergekit_ot import AbstractRepair, DataError, RepairContext
from mergeot_repair.control import changed_predictions

# Share of the calibration inputs whose prediction an honest re-estimate may change in an untouched source.
_TOLERATED = 0.10


class ResetRepair(AbstractRepair):
    """Replaces running means and variances by those of the calibration data (cumulative average, momentum None).

    The first source is the control: the same procedure must leave its predictions as they are.
    """

    needs_data = True

    def repair(self, context: RepairContext) -> dict[str, Tensor]:
        """Returns the fused state with new statistics; unchanged where the model has no BatchNorm.

        Raises:
            DataError: The procedure changes an untouched source, so the calibration data do not fit the models.
        """
        fused = context.instance(context.fused)
        if not _norms(fused):
            return dict(context.fused)
        heaviest = max(range(len(context.aligned)), key=lambda i: context.model_weights[i])
        self._check_control(context, context.aligned[heaviest])
        return _reestimated(fused, context.batches)

    def _check_control(self, context: RepairContext, state: Mapping[str, Tensor]) -> None:
        before = context.instance(state)
        after = context.instance(_reestimated(context.instance(state), context.batches))
        changed, total = changed_predictions(before, after, context.batches)
        if changed > _TOLERATED * total:
            raise DataError(
                f"Repair 'reset' would change {100 * changed / total:.0f} % of an untouched source's predictions: the "
                "calibration data do not look like what the sources were trained on. Give inputs with the sources' own "
                "preprocessing, and more of them (--calibration-size)."
            )


def _norms(model: nn.Module) -> list[_BatchNorm]:
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def _reestimated(model: nn.Module, batches: Iterable[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Returns the state of `model` after its statistics were averaged over all batches."""
    counts = {id(norm): norm.num_batches_tracked for norm in _norms(model)}
    kept = {key: None if count is None else count.clone() for key, count in counts.items()}
    for norm in _norms(model):
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for inputs in batches:
            model(*inputs)
    for norm in _norms(model):
        # The count is the sources' training history, not ours.
        if norm.num_batches_tracked is not None and kept[id(norm)] is not None:
            norm.num_batches_tracked.copy_(kept[id(norm)])  # type: ignore[arg-type]
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
