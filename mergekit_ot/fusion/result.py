"""What a fusion returns, and what observers are told after a step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from mergekit_ot.errors import RecipeError
from mergekit_ot.fusion.alignment import Alignment
from mergekit_ot.fusion.comparison import RepairComparison
from mergekit_ot.fusion.depth.deepening import Deepening
from mergekit_ot.fusion.extent import Extent
from mergekit_ot.fusion.function_check import FunctionCheck
from mergekit_ot.fusion.growth.record import Growth
from mergekit_ot.fusion.heads import MultiHead, head_sizes
from mergekit_ot.fusion.moving import moved_state
from mergekit_ot.fusion.networks import DeferredField, FusedNetworks
from mergekit_ot.fusion.options import FusionOptions
from mergekit_ot.fusion.plan import FusionPlan
from mergekit_ot.fusion.repair import AlignedModels, RepairContext, repair_context
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.fusion.step_report import GroupReport
from mergekit_ot.fusion.written import ResultCheck, template_of
from mergekit_ot.progress import Progress

_NOTHING = Extent(0, 0, 0.0)


@dataclass(frozen=True)
class FusionResult:
    """A fused model and how it came about.

    Attributes:
        state: Parameters and buffers of the fused model: a dict, or a `TensorStore` where they went to a writer.
        alignment: The couplings.
        groups: One report per group.
        aligned_sources_max_error: Largest difference between a source's outputs and those of its aligned copy,
            relative to the outputs' scale; zero up to rounding wherever all couplings are permutations.
        plan: The plan that was run.
        solver: Name of the solver.
        options: What was chosen.
        seconds: Wall time.
        warnings: Sentences the user should read.
        objectives: Objective of the whole alignment where it was needed: ``aligned`` (restarts), ``before
            refinement`` and ``after refinement``.
        notes: Sentences about what was done: to sources of other number types, and by the repair.
        extent: How many groups were aligned, which share of the weights is pinned, and why.
        check: What running the sources and their aligned copies showed; None for a dry run.
        repair_comparison: The result beside the sources, their mean and, with a repair, the unrepaired network, on
            inputs that nothing was fitted to; None where there were no data to compare them on.
        deepened: What was done to sources that had fewer blocks than the fused network.
        alone: Place of the source that is the result alone (option ``fallback``); None where the fused network is.
        networks: The networks that were fused. Where they were averaged without a trace, they are traced when
            `alignment`, `groups`, `plan` or `extent` is first asked for.

    Example:
        The fused state is the mean of the sources, each in the fused model's neuron order:

        >>> import torch
        >>> from mergekit_ot import fuse
        >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2)]
        >>> result = fuse(nets, solver="weight-matching", example_inputs=torch.randn(2, 4))
        >>> first, second = (result.aligned_state(source)["0.weight"] for source in range(2))
        >>> torch.allclose(result.state["0.weight"], (first + second) / 2)
        True
        >>> result.aligned_sources_max_error < 1e-5
        True
        >>> result
        <FusionResult: 2 sources fused with weight-matching in ... s. 1 of 1 neuron groups aligned, no weight pinned.>
    """

    state: Mapping[str, Tensor]
    aligned_sources_max_error: float | None
    solver: str
    options: FusionOptions
    seconds: float
    warnings: tuple[str, ...]
    target: SourceModel
    alignment: DeferredField[Alignment] = DeferredField()  # noqa: RUF009 - a descriptor, which is no default
    groups: DeferredField[tuple[GroupReport, ...]] = DeferredField()  # noqa: RUF009
    plan: DeferredField[FusionPlan] = DeferredField()  # noqa: RUF009
    sources: tuple[SourceModel, ...] = field(repr=False, default=())
    objectives: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    extent: DeferredField[Extent] = DeferredField(_NOTHING)  # noqa: RUF009
    check: FunctionCheck | None = None
    repair_comparison: RepairComparison | None = None
    alone: int | None = None
    deepened: tuple[Deepening, ...] = ()
    networks: FusedNetworks | None = field(repr=False, default=None)

    def __repr__(self) -> str:
        # Weights, graphs and couplings would fill screens; and an average need not be traced to be shown.
        aligned = f" {self.extent.sentence}" if self.is_traced else ""
        return f"<FusionResult: {len(self.sources)} sources fused with {self.solver} in {self.seconds:.2f} s.{aligned}>"

    @property
    def is_traced(self) -> bool:
        """Whether neuron groups were looked for: an average of sources as they stand needs none."""
        return self.networks is None or self.networks.is_traced

    def aligned_state(self, source: int) -> dict[str, Tensor]:
        """Returns the state of a source in the fused model's neuron order (and sizes); in normal form, if it was."""
        models = self.models
        return aligned_state(models.sources[source], models.target, self.alignment, source)

    def aligned_module(self) -> nn.Module:
        """Returns a fresh module for aligned states: of the fused architecture, its tied weights apart if they were."""
        return self.models.target.architecture.built()

    def checked_state(self, source: int, model: SourceModel | None = None) -> dict[str, Tensor]:
        """Returns `aligned_state`, checked as whatever is written is.

        Args:
            source: Number of the source.
            model: The same source in number types of its own, where the fusion read it in others.

        Raises:
            ResultError: A tensor has another shape or type than the architecture's, or is not finite.
        """
        own = model or self.sources[source]
        template = template_of(self.target, (own,))
        state = moved_state(own.state, template, self.alignment, source)
        ResultCheck(template, (own,), f"solver '{self.solver}'").state(state)
        return state

    @property
    def models(self) -> AlignedModels:
        """The networks and their alignment, in the form in which they were aligned."""
        traced = self.networks.traced if self.networks is not None and self.networks.is_traced else None
        if traced is None:
            return AlignedModels(self.target, self.sources, self.alignment)
        target, sources = (traced.target, traced.sources) if traced.normal is not None else (self.target, self.sources)
        kept, joined = frozenset(traced.rules.kept), frozenset(traced.heads)
        return AlignedModels(target, sources, self.alignment, traced.normal, traced.originals, kept, joined)

    @property
    def growth(self) -> Growth | None:
        """What became wider than it is in the target, where that was asked for (``widen``)."""
        traced = self.networks.traced if self.networks is not None and self.networks.is_traced else None
        return None if traced is None else traced.growth

    @property
    def head_sizes(self) -> tuple[int, ...]:
        """Outputs of the head of each source, where the fused model has the heads of all; empty where it has one."""
        traced = self.networks.traced if self.networks is not None and self.networks.is_traced else None
        return () if traced is None or not traced.heads else head_sizes(traced.graphs, traced.heads)

    def multi_head(self, axis: int = 1) -> MultiHead:
        """Returns the fused model with one output per source, where it has the heads of all (``head="both"``).

        Args:
            axis: The axis of the network's output along which classes stand.

        Raises:
            RecipeError: It has one head.
        """
        if not self.head_sizes:
            raise RecipeError("The fused model has one head. Fuse with head='both'.")
        return MultiHead(self.model(), self.state, self.head_sizes, axis).eval()

    def repair_context(
        self,
        fused: Mapping[str, Tensor],
        model_weights: Sequence[float],
        batches: Iterable[tuple[Tensor, ...]],
        progress: Progress | None = None,
        aligned: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> RepairContext:
        """Returns what a repair of `fused`, a mean of the aligned sources, works with.

        Args:
            fused: A state of the fused architecture.
            model_weights: With which the sources were averaged.
            batches: Calibration inputs, in batches of the size that the sources were traced with.
            progress: Told what is done.
            aligned: State of each source in the fused model's neuron order, where they are known already.
        """
        if aligned is None:
            aligned = [self.aligned_state(number) for number in range(len(self.sources))]
        return repair_context(self.models, fused, aligned, model_weights, batches, progress)

    def model(self) -> nn.Module:
        """Returns a module that holds the fused state, in evaluation mode."""
        return self.target.instance(self.state)


def aligned_state(source: SourceModel, target: SourceModel, alignment: Alignment, number: int) -> dict[str, Tensor]:
    """Returns the state of source `number` in the neuron order and sizes of the target."""
    return moved_state(source.state, template_of(target, (source,)), alignment, number)
