"""Repairs: what is done to the fused model after the couplings. Each is a plugin."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from mergekit_ot.fusion.alignment import Alignment
from mergekit_ot.fusion.moving import transport_values
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.graph.capture.program import CapturedProgram
from mergekit_ot.progress import Notify, Progress


@dataclass(frozen=True)
class RepairSource:
    """A source model as a repair sees it: what it computes, and how its neurons' values are brought into fused order.

    Attributes:
        program: What the source computes, of its own widths; operations have the names of the fused model's.
        state: Its parameters and buffers, in its own order.
        number: Its place among the sources.
        alignment: The couplings of the fusion.
    """

    program: CapturedProgram
    state: Mapping[str, Tensor]
    number: int
    alignment: Alignment

    def in_fused_order(self, values: Tensor, axis: int, parameter: str, parameter_axis: int = 0) -> Tensor:
        """Returns values of neurons in the fused model's order and number.

        Args:
            values: One entry per neuron of the source along `axis`.
            axis: Where the neurons are.
            parameter: A parameter that owns these neurons on `parameter_axis` (a linear map's rows, a bias).
            parameter_axis: Which of its axes that is.
        """
        return transport_values(values, axis, parameter, parameter_axis, self.alignment, self.number)


@dataclass(frozen=True)
class RepairContext:
    """What a repair works with.

    Attributes:
        instance: Gives a fresh instance of the fused architecture, in evaluation mode, that holds a state.
        fused: State of the fused model.
        aligned: State of each source in the fused model's neuron order.
        model_weights: One per source.
        batches: Calibration inputs, to be iterated as often as needed; each item is a tuple of positional inputs.
        program: What the fused model computes (`mergekit_ot.CapturedProgram`), to be run with any state.
        sources: Each source with its own program.
        progress: Called with (steps done, steps in all, what is done).
        note: Called with a sentence that the user of the fusion is told.
    """

    instance: Callable[[Mapping[str, Tensor]], nn.Module]
    fused: Mapping[str, Tensor]
    aligned: tuple[Mapping[str, Tensor], ...]
    model_weights: tuple[float, ...]
    batches: Iterable[tuple[Tensor, ...]]
    program: CapturedProgram
    sources: tuple[RepairSource, ...]
    progress: Progress | None = None
    note: Notify | None = None


def repair_context(
    fused: Mapping[str, Tensor],
    aligned: Sequence[Mapping[str, Tensor]],
    target: SourceModel,
    sources: Sequence[SourceModel],
    alignment: Alignment,
    model_weights: Sequence[float],
    batches: Iterable[tuple[Tensor, ...]],
    progress: Progress | None = None,
    note: Notify | None = None,
) -> RepairContext:
    """Returns what a repair of `fused` works with."""
    views = tuple(
        # A repair runs the programs with whole states, again and again: each tensor is read once.
        RepairSource(graph.program, dict(source.state), number, alignment)
        for number, (source, graph) in enumerate(zip(sources, alignment.graphs, strict=True))
    )
    return RepairContext(
        target.instance, fused, tuple(aligned), tuple(model_weights), batches, alignment.target.program, views,
        progress, note,
    )  # fmt: skip


class AbstractRepair(abc.ABC):
    """Changes the fused state without labels or training.

    Attributes:
        needs_data: Whether calibration data are needed.
    """

    needs_data: bool = True

    @abc.abstractmethod
    def repair(self, context: RepairContext) -> dict[str, Tensor]:
        """Returns the repaired state of the fused model.

        Raises:
            MergeotError: The repair changes an untouched source, which is its control.
        """
