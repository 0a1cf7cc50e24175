"""Turns what a user asks for into a checked fusion: sources, graphs, solver, measure, weights, data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_ot.errors import RecipeError, reason_of
from mergekit_ot.fusion.depth.deepening import Deepening
from mergekit_ot.fusion.executor import AbstractExecutor
from mergekit_ot.fusion.layer_rules import LayerRules
from mergekit_ot.fusion.networks import FusedNetworks
from mergekit_ot.fusion.node_measure import AbstractNodeMeasure
from mergekit_ot.fusion.options import FusionOptions
from mergekit_ot.fusion.repair import AbstractRepair
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.fusion.step_report import StepReport
from mergekit_ot.fusion.tracing import TracedModels
from mergekit_ot.graph.capture.front_end import TraceLimits
from mergekit_ot.graph.symmetry.symmetry import AbstractSymmetry
from mergekit_ot.scoring.devices import choose_device, has_double
from mergekit_ot.threads import multiplications_of_run
from mergekit_ot.transport.solver import AbstractBarycenterSolver

_SEEDS = 2**63
NO_RULES = LayerRules()


@dataclass(frozen=True)
class FusionInputs:
    """What is fused, whatever the method.

    Attributes:
        models: The sources: modules, or `SourceModel` where states are read from disk.
        target: Whose sizes the fused model takes: a source's number, or another module of the architecture.
        example_inputs: Inputs to trace the models with; the first batch of `data` where there are none.
        data: Calibration batches, of inputs or (inputs, targets); targets are never read.
        may_rewrite: Whether a solver may align the networks in their normal forms, which compute the same with other
            weights; otherwise every source keeps its own.
        is_compared: Whether, where there are data, the fused network is compared with its sources on some of them.

    Example:
        Two networks to be fused into the sizes of the second:

        >>> narrow, wide = nn.Linear(4, 2), nn.Linear(4, 2)
        >>> inputs = FusionInputs([narrow, wide], target=1, example_inputs=torch.randn(1, 4))
        >>> inputs.data is None
        True
    """

    models: Sequence[nn.Module | SourceModel]
    target: int | nn.Module | SourceModel = 0
    example_inputs: Tensor | tuple[object, ...] | None = None
    data: Iterable[Any] | None = None
    may_rewrite: bool = True
    is_compared: bool = True


@dataclass(frozen=True)
class MethodsOfLayers:
    """How the neurons are coupled that some layers make.

    Attributes:
        names: The parameters of the layers.
        solver: What couples them; None for that of the fusion.
        measure: What they are seen by; None for that of the fusion.
    """

    names: frozenset[str]
    solver: AbstractBarycenterSolver | None = None
    measure: AbstractNodeMeasure | None = None


@dataclass(frozen=True)
class FusionMethods:
    """How a fusion goes: everything that a plugin may bring, built.

    Attributes:
        solver: What couples neurons.
        measure: What they are seen by.
        executor: What runs the steps.
        repair: What is done after the couplings, or None.
        refinement: The solver that sweeps on from the couplings found, or None.
        symmetries: What may be done to neurons; those that a solver asks for are looked for.
        of_layers: What holds for the neurons that some layers make.
    """

    solver: AbstractBarycenterSolver
    measure: AbstractNodeMeasure
    executor: AbstractExecutor
    repair: AbstractRepair | None = None
    refinement: AbstractBarycenterSolver | None = None
    symmetries: tuple[AbstractSymmetry, ...] = ()
    of_layers: tuple[MethodsOfLayers, ...] = ()

    def of_step(self, makers: Collection[str]) -> tuple[AbstractBarycenterSolver, AbstractNodeMeasure]:
        """Returns the solver and the measure of neurons; of two rules for one layer, the last counts.

        Args:
            makers: The parameters that make the neurons.
        """
        solver, measure = self.solver, self.measure
        for own in self.of_layers:
            if own.names & set(makers):
                solver, measure = own.solver or solver, own.measure or measure
        return solver, measure

    @property
    def needs_data(self) -> bool:
        """Whether a measure looks at responses to calibration data."""
        measures = (self.measure, *(own.measure for own in self.of_layers))
        return any(measure.needs_data for measure in measures if measure is not None)

    @property
    def solvers(self) -> tuple[AbstractBarycenterSolver, ...]:
        """The solver, and the one that refines what it found."""
        return tuple(solver for solver in (self.solver, self.refinement) if solver is not None)

    @property
    def uses_rotations(self) -> bool:
        """Whether a solver aligns networks in their normal form."""
        return any(solver.uses_rotations for solver in self.solvers)


@dataclass(frozen=True)
class FusionSetup:
    """Everything a fusion needs, checked.

    Attributes:
        networks: The sources and the target, traced when their graphs are first asked for.
        model_weights: One per source, summing to one.
        methods: How.
        inputs: Example inputs, for tracing and for the function check.
        batches: Calibration inputs in batches of one size, possibly none.
        held_out: More of them, which nothing is fitted to and the result is judged on.
        options: What the user chose.
        observers: Told about every step.
        notes: What the user should know about the sources and the calibration data.
        needs_no_graph: Whether the fusion can be made without a graph.
        data: The calibration data as they were given, for what only some networks need.
        rules: What holds for single parameters.
        deepened: What was done to sources that had fewer blocks than the fused network.
    """

    networks: FusedNetworks
    model_weights: tuple[float, ...]
    methods: FusionMethods
    inputs: tuple[object, ...]
    batches: tuple[tuple[Tensor, ...], ...]
    device: torch.device
    options: FusionOptions
    observers: tuple[Callable[[StepReport], None], ...] = ()
    held_out: tuple[tuple[Tensor, ...], ...] = ()
    notes: tuple[str, ...] = ()
    needs_no_graph: bool = False
    data: Iterable[Any] | None = None
    rules: LayerRules = NO_RULES
    deepened: tuple[Deepening, ...] = ()

    @property
    def models(self) -> TracedModels:
        """The sources and the target, traced."""
        return self.networks.traced

    @property
    def multiplications(self) -> float:
        """About how many multiplications the largest piece of work takes: a step, or running a source on all data."""
        state = self.networks.sources[0].state
        parameters = sum(state.shape(name).numel() for name in state)
        batches = [self.inputs, *self.batches, *self.held_out]
        groups = self.models.target_graph.groups.values() if self.methods.solver.max_sweeps else ()
        steps = parameters * max((group.size for group in groups), default=0)
        return max(steps, sum(multiplications_of_run(parameters, inputs) for inputs in batches))


def checked_device(name: str) -> torch.device:
    """Returns the device of a name, of ``auto`` the best one; that of the CPU where it has no double precision.

    Raises:
        RecipeError: There is no such device, or not in this machine.
    """
    if name.partition(":")[0] == "mps":
        return torch.device("cpu" if not has_double(choose_device(name)) else name)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    try:
        device = torch.device(chosen)
        # A device without memory, or one that this machine lacks, gives no number back.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"Device '{name}' cannot be used: {reason_of(error)}. Take auto, cpu or cuda.") from error
    return device


def device_note(name: str) -> tuple[str, ...]:
    """Returns a sentence on where couplings are computed, where that is not the device that was asked for."""
    if name.partition(":")[0] != "mps":
        return ()
    return ("Couplings are computed on the CPU: they need double precision, which MPS has not.",)


def checked_seed(seed: int) -> int:
    """Returns a seed that all generators take.

    Raises:
        RecipeError: It is negative or too large.
    """
    if not 0 <= seed < _SEEDS:
        raise RecipeError(f"seed={seed!r:.80}: it is a number from 0 to 2**63 - 1.")
    return seed


def trace_limits(options: FusionOptions) -> TraceLimits:
    """Returns the limits of tracing that were chosen, the default ones where none were."""
    chosen = {"seconds": options.trace_seconds, "operations": options.trace_operations}
    return replace(TraceLimits(), **{name: limit for name, limit in chosen.items() if limit is not None})
