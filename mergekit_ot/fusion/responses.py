"""The neurons' responses to calibration data, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor, fx

from mergekit_ot.errors import DataError
from mergekit_ot.graph.blocks import group_places, real_blocks_of, rows_along
from mergekit_ot.graph.ir import ModelGraph

if TYPE_CHECKING:
    from mergekit_ot.graph.capture.program import CapturedProgram

# Added to the diagonal of a Gram matrix, relative to its mean, so that a root always exists.
_JITTER = 1e-9
# Responses of a neuron to one value of the network that are looked at: so many per neuron of all sources, so many at
# least, and one per sample. More of the places of a sequence or an image make every group dearer and tell no more.
_PER_NEURON, _LEAST = 8, 4096
# A neuron whose variance is below this fraction of the mean says nothing; it is not blown up to unit variance.
_SILENT = 1e-8


class _Recorder(fx.Interpreter):
    """Runs a captured program and keeps the values that are asked for."""

    def __init__(self, module: fx.GraphModule, wanted: set[str]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.wanted = wanted
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch.ops.aten.view.default:
            # Captured with strides that were guessed; a tensor that runs may have others, of which no view is one.
            values, shape = self.fetch_args_kwargs_from_env(n)[0]
            result = values.reshape(shape)
        else:
            result = super().run_node(n)
        if n.name in self.wanted and isinstance(result, Tensor):
            self.kept[n.name] = result
        return result


def run_program(
    program: CapturedProgram, state: Mapping[str, Tensor], inputs: Sequence[Tensor], wanted: set[str]
) -> dict[str, Tensor]:
    """Returns the values named in `wanted` when the captured program runs on `inputs` with the parameters `state`."""
    recorder = _Recorder(program.module, wanted)
    with torch.no_grad():
        recorder.run(*program.arguments(state, inputs))
    return recorder.kept


class _Drawn:
    """Which places of a batch are looked at: the same for all values with as many of them, and for all sources.

    Args:
        batch: Number of the batch.
        samples: How many samples it has; at least so many places are taken.
    """

    def __init__(self, batch: int, samples: int) -> None:
        self.batch, self.samples = batch, samples
        self._places: dict[tuple[int, int], Int[Tensor, " place"]] = {}

    def rows(self, view: Shaped[Tensor, ...], place: int, wanted: int) -> Shaped[Tensor, "n d"]:
        """Returns one row per index of the dimension `place`: all that stands beside it, or as much as is wanted."""
        wanted, there = max(wanted, self.samples), view.numel() // max(1, view.shape[place])
        if there <= wanted:
            return rows_along(view, place)
        beside = view.movedim(place, 0)
        chosen = torch.unravel_index(self._among(there, wanted).to(view.device), beside.shape[1:])
        return beside[(slice(None), *chosen)]

    def _among(self, there: int, wanted: int) -> Int[Tensor, " place"]:
        if (there, wanted) not in self._places:
            generator = torch.Generator().manual_seed(self.batch)
            drawn = torch.randperm(there, generator=generator)[:wanted]
            self._places[there, wanted] = drawn.sort().values
        return self._places[there, wanted]


class ResponseGrams:
    """Inner products between the responses of all neurons of all sources, summed over calibration batches.

    Only these matrices are kept, never the responses: for a group of n neurons in N sources ``[N n, N n]``. Of the
    places of a sequence or an image, as many are drawn as tell the neurons apart: the same in every source, and the
    same in every run.

    Args:
        graphs: Graph of each source, traced at the calibration batch's shape.
        states: State of each source.
        groups: The groups to observe.
        batches: How many batches will be added; each has its share of the places.

    Example:
        The inner products of the four hidden neurons of one source, and of another:

        >>> from torch import nn
        >>> from mergekit_ot import trace_model
        >>> nets = [nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)) for _ in range(2)]
        >>> inputs = torch.randn(8, 3)
        >>> graphs = [trace_model(net, inputs) for net in nets]
        >>> grams = ResponseGrams(graphs, [net.state_dict() for net in nets], ["0.weight:0"])
        >>> grams.add([inputs])
        >>> grams.grams["0.weight:0"].shape
        torch.Size([8, 8])
    """

    def __init__(
        self,
        graphs: Sequence[ModelGraph],
        states: Sequence[Mapping[str, Tensor]],
        groups: Iterable[str],
        batches: int = 1,
    ) -> None:
        self.graphs, self.states, self.batches = graphs, states, batches
        self.groups = list(groups)
        self._added = 0
        self.grams: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.columns: dict[str, int] = {}

    def add(self, inputs: Sequence[Tensor]) -> None:
        """Adds one batch of inputs."""
        drawn = _Drawn(self._added, len(inputs[0]))
        self._added += 1
        seen = [
            self._responses(graph, state, inputs, drawn) for graph, state in zip(self.graphs, self.states, strict=True)
        ]
        for group in self.groups:
            parts = [responses[group] for responses in seen if group in responses]
            if len(parts) != len(self.graphs):
                continue
            rows = torch.cat(parts).double()
            self.grams[group] = self.grams.get(group, 0) + rows @ rows.T
            self.sums[group] = self.sums.get(group, 0) + rows.sum(1)
            self.columns[group] = self.columns.get(group, 0) + rows.shape[1]

    def _share(self, group: str) -> int:
        """Returns how many responses of a group to one value of the network are looked at in a batch."""
        neurons = sum(graph.groups[group].size for graph in self.graphs)
        return -(-max(_LEAST, _PER_NEURON * neurons) // self.batches)

    def _responses(
        self, graph: ModelGraph, state: Mapping[str, Tensor], inputs: Sequence[Tensor], drawn: _Drawn
    ) -> dict[str, Tensor]:
        values = run_program(graph.program, state, inputs, set(graph.values))
        rows: dict[str, list[Tensor]] = {}
        for name, value in values.items():
            for block in real_blocks_of(value, graph.values[name]):
                for place, key in group_places(block):
                    group = graph.free_groups.get(key)
                    if group is not None and not group.context:
                        rows.setdefault(key, []).append(drawn.rows(block.view, place, self._share(key)))
        return {key: torch.cat(columns, 1) for key, columns in rows.items()}

    def of(self, groups: Iterable[str]) -> GroupResponses:
        """Returns what is known of some groups."""
        known = [group for group in groups if group in self.grams]
        return GroupResponses(
            {group: self.grams[group] for group in known},
            {group: self.sums[group] for group in known},
            {group: self.columns[group] for group in known},
            {group: [graph.groups[group].size for graph in self.graphs] for group in known},
        )

    def rows(self, group: str, standardised: bool = False) -> list[Tensor] | None:
        """Returns the rows of one group, as `GroupResponses.rows` does."""
        return self.of([group]).rows(group, standardised)


@dataclass(frozen=True)
class GroupResponses:
    """Inner products between the responses of all neurons of some groups, in all sources.

    Attributes:
        grams: Group → inner products. Shape ``[N n, N n]``.
        sums: Group → sum of every neuron's responses. Shape ``[N n]``.
        columns: Group → number of responses per neuron.
        sizes: Group → number of neurons in each source.
    """

    grams: Mapping[str, Tensor]
    sums: Mapping[str, Tensor]
    columns: Mapping[str, int]
    sizes: Mapping[str, list[int]]

    def rows(self, group: str, standardised: bool = False) -> list[Tensor] | None:
        """Returns rows, per source, whose distances are those of the centred responses (per column).

        The mean response is left out: what it adds is a constant that the next layer's bias takes up.

        Args:
            group: Key of the group.
            standardised: Whether each neuron's responses are scaled to unit variance, so that distances measure
                correlation.

        Raises:
            DataError: The responses are not finite.
        """
        if group not in self.grams:
            return None
        if not bool(torch.isfinite(self.grams[group]).all()):
            raise DataError(
                f"The responses of group '{group}' to the calibration data are not finite, or too large to be squared. "
                "Look for NaN, infinity or huge numbers in the data and in the sources' weights."
            )
        mean = self.sums[group] / self.columns[group]
        gram = self.grams[group] / self.columns[group] - torch.outer(mean, mean)
        if standardised:
            deviation = gram.diagonal().clamp_min(0).sqrt()
            gram = gram / torch.outer(deviation, deviation).clamp_min(_SILENT * float(gram.diagonal().mean() + 1e-300))
        jitter = _JITTER * float(gram.diagonal().mean()) + torch.finfo(gram.dtype).tiny
        root = _root(gram + jitter * torch.eye(gram.shape[0], dtype=gram.dtype))
        return [part.float() for part in root.split(self.sizes[group])]


def _root(gram: Tensor) -> Tensor:
    """Returns rows with the given inner products; rounding may have left a Gram matrix slightly indefinite."""
    root, info = torch.linalg.cholesky_ex(gram)
    if not int(info):
        return root
    values, vectors = torch.linalg.eigh(gram)
    return vectors * values.clamp_min(0).sqrt()
