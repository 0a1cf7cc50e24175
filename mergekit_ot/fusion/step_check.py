"""What a step found is looked at before anything is built on it."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_ot.errors import SolverError
from mergekit_ot.fusion.alignment import Alignment
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.fusion.step_report import GroupReport, StepReport
from mergekit_ot.transport.problem import Status


def check_step(report: StepReport, alignment: Alignment, sources: Sequence[SourceModel]) -> None:
    """Checks what a step found.

    Args:
        report: What it says.
        alignment: The couplings that hold now.
        sources: The sources, for the message.

    Raises:
        SolverError: Costs between neurons are not finite.
    """
    for group in report.groups:
        if group.status is Status.NONFINITE:
            raise SolverError(_overflow(group, alignment, sources))


def _overflow(group: GroupReport, alignment: Alignment, sources: Sequence[SourceModel]) -> str:
    names = {slot.parameter for slot in alignment.target.groups[group.name].members}
    sizes = [
        (float(source.state.read(name).abs().max()), name, source.name)
        for source in sources
        for name in sorted(names)
        if source.state.read(name).numel()
    ]
    largest, name, owner = max(sizes, default=(0.0, group.name, "a source"))
    return (
        f"Solver '{group.solver}' cannot compare the neurons of group '{group.name}': costs between them are not "
        f"finite, though every weight is (the largest, {largest:.2g}, is in '{name}' of '{owner}'). Nothing was "
        "written. Where that is too large for single precision, scale the layers down by factors that cancel; where "
        "neurons are compared by calibration data, look for NaN and infinity there; or take another solver."
    )
