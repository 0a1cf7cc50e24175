"""A fusion without a repair is judged too: which inputs it is compared on, and how near it came."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mergekit_ot.errors import DataError, reason_of
from mergekit_ot.fusion.calibration import (
    CALIBRATION_BATCH,
    LEAST_HELD_OUT,
    MOST_HELD_OUT,
    CalibrationData,
    calibration_inputs,
    in_batches,
)
from mergekit_ot.fusion.comparing import compare_repair
from mergekit_ot.fusion.comparison import RepairComparison
from mergekit_ot.fusion.options import NO_REPAIR
from mergekit_ot.fusion.predictions import Aim
from mergekit_ot.fusion.samples import check_outliers, inputs_of, read_samples, tokens_note, tokens_per_sample
from mergekit_ot.fusion.setup import FusionSetup
from mergekit_ot.fusion.source import SourceModel

# Of long sequences fewer are enough, and all cost a forward pass of every source.
_MOST_TOKENS = 20_000


def data_to_compare(data: Iterable[Any], size: int, needs_batches: bool) -> tuple[CalibrationData, tuple[object, ...]]:
    """Returns the inputs that couplings are found with and those that the result is judged on, and the first batch.

    They are others where the data hold more than `size`; couplings are fitted to no output, so that else some of the
    same do.

    Args:
        data: Batches of inputs, or of (inputs, targets).
        size: Samples at most that couplings are found with.
        needs_batches: Whether they are found with any.

    Raises:
        DataError: The data hold no samples, or some that nothing can be told from.
    """
    items = iter(data)
    ahead = list(itertools.islice(items, 1))
    if not ahead:
        raise DataError("The data hold no batch. Give some with --data, or --input-shape.")
    first = inputs_of(ahead[0])
    fitted = size if needs_batches else 0
    most = min(MOST_HELD_OUT, max(LEAST_HELD_OUT, _MOST_TOKENS // max(tokens_per_sample(first), 1)))
    samples, notes = read_samples(itertools.chain(ahead, items), fitted + most)
    to_fit = calibration_inputs([(tuple(part[:fitted] for part in samples), None)], fitted) if needs_batches else ()
    to_judge = tuple(part[fitted:] for part in samples)
    if len(to_judge[0]) < LEAST_HELD_OUT:
        to_judge = tuple(part[:most] for part in samples)
    check_outliers(to_judge)
    batch = min(len(first[0]), CALIBRATION_BATCH, len(to_judge[0]))
    notes = (*notes, *tokens_note(to_fit)) if to_fit else ()
    return CalibrationData(to_fit, in_batches(to_judge, batch), notes), to_fit[0] if to_fit else first


def judged(
    setup: FusionSetup,
    target: SourceModel,
    sources: Sequence[SourceModel],
    fused: Mapping[str, Tensor],
    mean: Mapping[str, Tensor] | None = None,
) -> tuple[RepairComparison | None, tuple[str, ...]]:
    """Returns how near a fused network and each source are to the ensemble of the sources, or why it is not known.

    Args:
        setup: The fusion.
        target: The architecture of the fused network.
        sources: In the form in which they were fused.
        fused: The state, which no repair has changed.
        mean: The mean of the sources' weights, neurons taken as they stand, where it is another network.
    """
    weights, held_out = setup.model_weights, setup.held_out
    try:
        return compare_repair(NO_REPAIR, (fused, fused), target, sources, weights, held_out, Aim.OUTPUTS, mean), ()
    except Exception as error:
        # Nobody asked for it, and what a network does with further inputs must not cost the fusion.
        why = reason_of(error)
    return None, (f"The fused network could not be compared with its sources on the data ({why}).",)
