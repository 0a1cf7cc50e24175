"""The contract of node measures, clause by clause, and the small networks it is checked on."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergekit_ot.api import trace_model
from mergekit_ot.fusion.alignment import Alignment
from mergekit_ot.fusion.group_view import GroupView
from mergekit_ot.fusion.node_measure import AbstractNodeMeasure
from mergekit_ot.fusion.responses import ResponseGrams
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.order import solve_order
from mergekit_ot.graph.symmetry.permutation import reorder_state
from mergekit_ot.hooks.manager import PluginManager, default_manager
from mergekit_ot.testing.clauses import Contract, raised_by
from mergekit_ot.transport.barycenter import independent_coupling
from mergekit_ot.transport.coupling import Coupling
from mergekit_ot.transport.measure import NeuronMeasure, uniform_mass
from mergekit_ot.transport.permutation import Permutation
from mergekit_ot.transport.solver import Scope

# Relative to the mean squared distance; measures by responses round in single precision and add a jitter.
_TOLERANCE = 1e-3
_SAMPLES = 32

State = Mapping[str, Tensor]


def check_measure(measure: AbstractNodeMeasure | str, *, manager: PluginManager | None = None, seed: int = 0) -> None:
    """Checks a node measure on small networks: an MLP, convolutions, a residual stream, neurons that nothing reads.

    The clauses: one measure per source, of the size of its group; all supports have the same number of columns, and
    are finite; masses are non-negative and sum to one; identical sources give identical supports; reordering a
    source's neurons reorders its rows (only distances count: coordinates may turn); the sources stay untouched; the
    same view gives the same measures.

    Args:
        measure: The measure, or the name of a registered one.
        manager: The plugins to use; the installed ones by default.
        seed: Seed of the networks and of the calibration data.

    Raises:
        PluginError: A clause is broken; the message says which, and where.

    Example:
        >>> check_measure("weights")
    """
    manager = manager if manager is not None else default_manager()
    name = measure if isinstance(measure, str) else type(measure).__name__
    built = manager.get("measure", measure)() if isinstance(measure, str) else measure
    advice = "Correct the measure; the clauses are listed in mergekit_ot.testing.check_measure."
    contract = Contract(f"The node measure '{name}'", advice, blame=raised_by("the measure"))
    for case in _cases(built.needs_data, manager, seed):
        for clause in _CLAUSES:
            contract.check(clause, built, case, where=f", for {case}")


class _Residual(nn.Module):
    """A stream that a square map reads and writes: its group refers to itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(4, width), nn.Linear(width, width), nn.Linear(width, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        stream = torch.relu(self.first(inputs))
        return self.last(stream + torch.tanh(self.inner(stream)))


class _Unread(nn.Module):
    """Neurons that no parameter reads, so that they have no recorded responses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.first(inputs).square().sum(1)


def _perceptron(width: int) -> nn.Module:
    body = nn.Linear(4, width), nn.ReLU(), nn.Linear(width, width + 1), nn.ReLU()
    return nn.Sequential(*body, nn.Linear(width + 1, 2))


def _convolutions(width: int) -> nn.Module:
    body = nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, 5, 3), nn.ReLU(), nn.Flatten()
    return nn.Sequential(*body, nn.Linear(5 * 4, 2))


_NETS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "an MLP": (_perceptron, (4,)),
    "convolutions": (_convolutions, (1, 6, 6)),
    "a residual stream": (_Residual, (4,)),
    "neurons that nothing reads": (_Unread, (4,)),
}
# Widths of the sources; the first has the fused model's.
_WIDTHS = ((6, 6), (6, 6, 6), (6, 9))


@dataclass(frozen=True)
class _Case:
    """The sources of one network and one of its groups, seen in one scope."""

    net: str
    graphs: tuple[ModelGraph, ...]
    states: list[State]
    group: str
    scope: Scope
    is_structured: bool
    batches: Sequence[Tensor]

    def __str__(self) -> str:
        widths = ", ".join(str(size) for size in self.sizes)
        return f"{self.net}, group '{self.group}' of sizes {widths}, scope {self.scope.value}"

    @property
    def sizes(self) -> list[int]:
        return [graph.groups[self.group].size for graph in self.graphs]

    def view(self, states: Sequence[State] | None = None) -> GroupView:
        """Returns the view of the group in sources with these states, in which the groups before it are aligned."""
        states = self.states if states is None else states
        order = solve_order(self.graphs[0])
        aligned = order if self.scope is Scope.INCIDENT else order[: order.index(self.group)]
        alignment = Alignment(self.graphs, self.graphs[0], {key: self._couplings(key) for key in aligned})
        responses = None
        if self.batches:
            grams = ResponseGrams(self.graphs, states, order)
            for batch in self.batches:
                grams.add((batch,))
            responses = grams.rows
        return GroupView(
            self.group, alignment, self.scope, lambda source, name: states[source][name], self.is_structured, responses
        )

    def _couplings(self, key: str) -> tuple[Coupling, ...]:
        like = torch.empty(0)
        sizes = [graph.groups[key].size for graph in self.graphs]
        return tuple(
            Permutation.identity(size)
            if size == sizes[0]
            else independent_coupling(uniform_mass(sizes[0], like), uniform_mass(size, like))
            for size in sizes
        )

    def reordered(self) -> tuple[list[State], Tensor]:
        """Returns the states with the group's neurons reordered in the last source, and the order."""
        order = torch.arange(self.sizes[-1]).roll(2)
        moved = reorder_state(self.states[-1], self.graphs[-1], {self.group: order})
        return [*self.states[:-1], moved], order


def _cases(needs_data: bool, manager: PluginManager, seed: int) -> Iterator[_Case]:
    for net, (make, shape) in _NETS.items():
        generator = torch.Generator().manual_seed(seed)
        batches = [torch.randn(_SAMPLES, *shape, generator=generator) for _ in range(2)]
        for widths in _WIDTHS:
            graphs = tuple(_graph_of(net, width, manager) for width in widths)
            states: list[State] = [_random_state(make(width), generator) for width in widths]
            for group in solve_order(graphs[0]):
                for scope in Scope if len(set(widths)) == 1 else (Scope.INCOMING,):
                    structured = scope is Scope.INCOMING
                    yield _Case(net, graphs, states, group, scope, structured, batches if needs_data else ())


@functools.lru_cache(maxsize=16)
def _graph_of(net: str, width: int, manager: PluginManager) -> ModelGraph:
    make, shape = _NETS[net]
    return trace_model(make(width), torch.zeros(_SAMPLES, *shape), manager)


def _random_state(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Returns a state of random values; variances are positive."""
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            state[name] = 0.5 + noise.abs() if name.endswith("running_var") else noise
        else:
            state[name] = tensor.clone()
    return state


def _one_measure_per_source(measure: AbstractNodeMeasure, case: _Case) -> str:
    """There is one measure per source, of the size of the group in that source."""
    found = measure.measure(case.view())
    if len(found) != len(case.graphs):
        return f"{len(found)} measures for {len(case.graphs)} sources"
    sizes = [tuple(each.support.shape)[:1] + tuple(each.mass.shape) for each in found]
    if sizes != [(size, size) for size in case.sizes]:
        return f"supports and masses have sizes {sizes}"
    wrong = [each.structure for each, n in zip(found, case.sizes, strict=True) if not _is_square(each.structure, n)]
    return f"a structure has shape {tuple(wrong[0].shape)}" if wrong and wrong[0] is not None else ""


def _supports_share_their_columns(measure: AbstractNodeMeasure, case: _Case) -> str:
    """All supports have the same number of columns, all structures the same number of matrices, and are finite."""
    found = measure.measure(case.view())
    columns = [each.support.shape[1] for each in found]
    if len(set(columns)) != 1:
        return f"the supports have {columns} columns"
    slices = [None if each.structure is None else each.structure.shape[0] for each in found]
    if len(set(slices)) != 1:
        return f"the structures have {slices} matrices"
    tensors = [tensor for each in found for tensor in (each.support, each.structure) if tensor is not None]
    return "" if all(bool(torch.isfinite(tensor).all()) for tensor in tensors) else "a measure holds NaN or infinity"


def _masses_are_probabilities(measure: AbstractNodeMeasure, case: _Case) -> str:
    """Masses are non-negative and sum to one."""
    for place, each in enumerate(measure.measure(case.view())):
        if not bool((each.mass >= 0).all()):
            return f"source {place} has a negative mass"
        if not math.isclose(float(each.mass.sum()), 1, abs_tol=1e-5):
            return f"the masses of source {place} sum to {float(each.mass.sum()):.6g}"
    return ""


def _identical_sources_look_identical(measure: AbstractNodeMeasure, case: _Case) -> str:
    """Identical sources give identical supports."""
    if any(graph is not case.graphs[0] for graph in case.graphs):
        return ""
    found = measure.measure(case.view(case.states[:1] * len(case.states)))
    scale = _scale(found)
    for place, each in enumerate(found):
        distance = float((each.support - found[0].support).square().sum(1).max())
        if distance > _TOLERANCE * scale:
            return f"neurons of source {place} are {distance**0.5:.2g} away from the same ones of source 0"
    return ""


def _rows_follow_the_neurons(measure: AbstractNodeMeasure, case: _Case) -> str:
    """Reordering a source's neurons reorders its rows: distances, masses and structures move with them."""
    states, order = case.reordered()
    before, after = measure.measure(case.view()), measure.measure(case.view(states))
    last = before[-1]
    structure = None if last.structure is None else last.structure[:, order][:, :, order]
    expected = [*before[:-1], NeuronMeasure(last.support[order], last.mass[order], structure)]
    distances = [_distances(each) for each in (expected, after)]
    if float((distances[0] - distances[1]).abs().max()) > _TOLERANCE * _scale(before):
        return "the distances between neurons changed"
    for one, other in zip(expected, after, strict=True):
        if not torch.allclose(one.mass, other.mass, atol=1e-6):
            return "the masses did not follow"
        if one.structure is not None and other.structure is not None:
            tolerance = _TOLERANCE * max(float(one.structure.abs().max()), 1e-6)
            if float((one.structure - other.structure).abs().max()) > tolerance:
                return "the structure did not follow"
    return ""


def _sources_stay_untouched(measure: AbstractNodeMeasure, case: _Case) -> str:
    """The sources stay untouched."""
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in case.states]
    measure.measure(case.view())
    for place, (kept, state) in enumerate(zip(before, case.states, strict=True)):
        changed = [name for name, tensor in state.items() if not torch.equal(tensor, kept[name])]
        if changed:
            return f"'{changed[0]}' of source {place} was changed in place"
    return ""


def _same_view_same_measures(measure: AbstractNodeMeasure, case: _Case) -> str:
    """The same view gives the same measures."""
    first, second = measure.measure(case.view()), measure.measure(case.view())
    for one, other in zip(first, second, strict=True):
        for ours, theirs in ((one.support, other.support), (one.mass, other.mass), (one.structure, other.structure)):
            if ours is not None and (theirs is None or not torch.equal(ours, theirs)):
                return "a second call gave something else"
    return ""


# What a measure does to its sources comes first: the other clauses would suffer from it.
_CLAUSES = (
    _sources_stay_untouched,
    _one_measure_per_source,
    _supports_share_their_columns,
    _masses_are_probabilities,
    _same_view_same_measures,
    _identical_sources_look_identical,
    _rows_follow_the_neurons,
)


def _is_square(structure: Tensor | None, size: int) -> bool:
    return structure is None or tuple(structure.shape)[1:] == (size, size)


def _distances(measures: Sequence[NeuronMeasure]) -> Tensor:
    rows = torch.cat([each.support for each in measures]).double()
    return torch.cdist(rows, rows).square()


def _scale(measures: Sequence[NeuronMeasure]) -> float:
    distances = _distances(measures)
    return max(float(distances.mean()), 1e-12) if distances.numel() else 1.0
