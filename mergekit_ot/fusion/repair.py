"""Repairs: what is done to the fused model after the couplings. Each is a plugin."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mergekit_ot.errors import blaming
from mergekit_ot.fusion.alignment import Alignment
from mergekit_ot.fusion.comparing import compare_repair
from mergekit_ot.fusion.comparison import RepairComparison
from mergekit_ot.fusion.moving import transport_values
from mergekit_ot.fusion.normal_states import NormalStates, NormalStore
from mergekit_ot.fusion.own_heads import with_sizes
from mergekit_ot.fusion.predictions import Aim
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.fusion.written import ResultCheck
from mergekit_ot.progress import Notify, Progress

if TYPE_CHECKING:
    from mergekit_ot.graph.capture.program import CapturedProgram


@dataclass(frozen=True)
class RepairSource:
    """A source model as a repair sees it: what it computes, and how its neurons' values are brought into fused order.

    Attributes:
        program: What the source computes, of its own widths; operations have the names of the fused model's.
        state: Its parameters and buffers, in its own order.
        number: Its place among the sources.
        alignment: The couplings of the fusion.
        instance: Gives a fresh instance of the source, in evaluation mode.

    Example:
        What is known per neuron of a source, brought into fused order:

        >>> import torch
        >>> from mergekit_ot import fuse
        >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2)]
        >>> inputs = torch.randn(2, 4)
        >>> result = fuse(nets, solver="weight-matching", example_inputs=inputs)
        >>> context = result.repair_context(result.state, (0.5, 0.5), [(inputs,)])
        >>> norms = context.sources[1].state["0.weight"].norm(dim=1)
        >>> moved = context.sources[1].in_fused_order(norms, 0, "0.weight")
        >>> torch.allclose(moved, context.aligned[1]["0.weight"].norm(dim=1))
        True
    """

    program: CapturedProgram
    state: Mapping[str, Tensor]
    number: int
    alignment: Alignment
    instance: Callable[[], nn.Module]

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
            Others are held out, on which the host compares what the repair returns with what it was given.
        program: What the fused model computes (`mergekit_ot.CapturedProgram`), to be run with any state.
        sources: Each source with its own program.
        progress: Called with (steps done, steps in all, what is done).
        note: Called with a sentence that the user of the fusion is told.
        aim: What the results are brought near to, as the repair itself decided (`AbstractRepair.aim`).
        kept: Parameters that the user keeps from one source: the host puts them back, whatever a repair makes of them,
            and what they make may have other sizes in other sources.
        joined: Parameters that hold the heads of all sources, in their order: what they make is what the sources make,
            side by side.
        device: Where a repair that takes long computes; all tensors above are on the CPU, as those it returns.
        seed: Of every random choice.

    Example:
        >>> import torch
        >>> from mergekit_ot import fuse
        >>> net, inputs = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)
        >>> result = fuse([net, net], example_inputs=inputs)
        >>> context = result.repair_context(result.state, (0.5, 0.5), [(inputs,)])
        >>> torch.allclose(context.instance(context.aligned[1])(inputs), net(inputs), atol=1e-6)
        True
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
    aim: Aim = Aim.OUTPUTS
    kept: frozenset[str] = frozenset()
    joined: frozenset[str] = frozenset()
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True)
class AlignedModels:
    """The networks of a fusion, and how their neurons correspond.

    Attributes:
        target: The architecture of the fused model.
        sources: In the user's order.
        alignment: The couplings.
        normal: How the sources' states were rewritten into their normal forms; None where they were not.
        originals: The sources as they were given, where they were rewritten.
        kept: Parameters that come from one source as they are.
        joined: Parameters that hold the heads of all sources.
    """

    target: SourceModel
    sources: tuple[SourceModel, ...]
    alignment: Alignment
    normal: NormalStates | None = None
    originals: tuple[SourceModel, ...] = ()
    kept: frozenset[str] = frozenset()
    joined: frozenset[str] = frozenset()

    def instance(self, state: Mapping[str, Tensor]) -> nn.Module:
        """Returns a network of the fused architecture that holds a state; one with heads of the sizes that it has."""
        shapes, uncompared = self.target.architecture.shapes, sorted(self.alignment.uncompared)
        sizes = {name: tuple(state[name].shape) for name in uncompared if state[name].shape != shapes[name].shape}
        model = with_sizes(self.target, sizes, self.alignment.target.aliases) if sizes else self.target
        return model.instance(state)

    @property
    def given(self) -> tuple[SourceModel, ...]:
        """The sources as they were given."""
        return self.originals if self.normal is not None else self.sources

    def rewritten(self, state: Mapping[str, Tensor], source: int) -> Mapping[str, Tensor]:
        """Returns a state of a source as it was given in the form in which it was aligned."""
        aligned = self.sources[source].state.store
        states = aligned.states if isinstance(aligned, NormalStore) else self.normal
        return state if states is None else states.store(state)


def plain_mean(models: AlignedModels, model_weights: Sequence[float]) -> Mapping[str, Tensor] | None:
    """Returns the mean of the sources' weights, neurons taken as they stand; None where their sizes differ.

    Args:
        models: The networks of a fusion.
        model_weights: One per source.
    """
    states = [source.state for source in models.given]
    first, shapes = states[0], models.target.architecture.shapes
    if any(set(state.names) != set(first.names) for state in states[1:]):
        return None
    if any(state.shape(name) != first.shape(name) for state in states[1:] for name in first.names):
        return None
    mean: dict[str, Tensor] = {}
    for name in first.names:
        mean[name] = own = first.read(name)
        if own.is_floating_point() or own.is_complex():
            parts = zip(model_weights, (state.read(name) for state in states), strict=True)
            mean[name] = sum((weight * part for weight, part in parts), torch.zeros_like(own))
    rewritten = models.rewritten(mean, 0)
    is_fitting = all(name in rewritten and rewritten[name].shape == shapes[name].shape for name in shapes)
    return rewritten if is_fitting else None


def repair_context(
    models: AlignedModels,
    fused: Mapping[str, Tensor],
    aligned: Sequence[Mapping[str, Tensor]],
    model_weights: Sequence[float],
    batches: Iterable[tuple[Tensor, ...]],
    progress: Progress | None = None,
    note: Notify | None = None,
) -> RepairContext:
    """Returns what a repair of `fused`, a mean of the `aligned` states, works with."""
    graphs = models.alignment.graphs
    sources = [
        # A repair runs the programs with whole states, again and again: each tensor is read once.
        RepairSource(graph.program, dict(source.state), number, models.alignment, source.instance)
        for number, (source, graph) in enumerate(zip(models.sources, graphs, strict=True))
    ]
    return RepairContext(
        instance=models.instance,
        fused=fused,
        aligned=tuple(aligned),
        model_weights=tuple(model_weights),
        batches=batches,
        program=models.alignment.target.program,
        sources=tuple(sources),
        progress=progress,
        note=note,
        kept=models.kept,
        joined=models.joined,
    )


class AbstractRepair(abc.ABC):
    """Changes the fused state without labels.

    Attributes:
        needs_data: Whether calibration data are needed.

    Example:
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from mergekit_ot import PluginManager, fuse, hookimpl
        >>> class WithoutBiases(AbstractRepair):
        ...     needs_data = False
        ...     def repair(self, context):
        ...         return {name: value * (not name.endswith("bias")) for name, value in context.fused.items()}
        >>> manager = PluginManager.load()
        >>> hook = hookimpl(lambda: {"without-biases": WithoutBiases})
        >>> manager.register(SimpleNamespace(mergeot_repairs=hook), "mine")
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> inputs = torch.randn(2, 4)
        >>> result = fuse([net, net], example_inputs=inputs, repair="without-biases", manager=manager)
        >>> bool(result.state["0.bias"].any())
        False
    """

    needs_data: bool = True

    def aim(self, context: RepairContext) -> Aim:
        """Returns what the results are brought near to; it is asked before the repair, and its result is judged by it.

        Raises:
            MergeotError: What the user asked for does not suit the network.
        """
        return Aim.OUTPUTS

    @abc.abstractmethod
    def repair(self, context: RepairContext) -> dict[str, Tensor]:
        """Returns the repaired state of the fused model.

        Raises:
            MergeotError: The repair changes an untouched source, which is its control.
        """


def repaired_unless_worse(
    repair: AbstractRepair,
    name: str,
    context: RepairContext,
    models: AlignedModels,
    held_out: Iterable[tuple[Tensor, ...]],
    template: Mapping[str, Tensor],
) -> tuple[Mapping[str, Tensor], RepairComparison | None]:
    """Returns the repaired state, or the unrepaired one where that is nearer to the sources; and how both compare.

    Args:
        repair: The repair.
        name: Its name.
        context: What it works with.
        models: The networks of the fusion.
        held_out: Inputs that are not among the batches of the context; without any, nothing is compared.
        template: State dict of the fused architecture; its tensors may be on the meta device.

    Raises:
        PluginError: The repair raises anything but an error of this package.
        ResultError: What it returns is no state of the architecture, or holds numbers that are not finite.
    """
    with blaming(repair, f"Repair '{name}'"):
        context = replace(context, aim=repair.aim(context))
        state = dict(repair.repair(context))
    aliases = models.alignment.target.aliases
    # Whatever a repair makes of them, what the user keeps stays.
    state |= {name: context.fused[name] for name in state if aliases.get(name, name) in models.kept}
    ResultCheck(template, models.sources, f"repair '{name}'").state(state)
    held_out = list(held_out)
    if not held_out:
        return state, None
    states, weights = (state, context.fused), context.model_weights
    mean = plain_mean(models, weights)
    found = compare_repair(name, states, models.target, models.sources, weights, held_out, context.aim, mean)
    return state if found is None or found.is_written else context.fused, found
