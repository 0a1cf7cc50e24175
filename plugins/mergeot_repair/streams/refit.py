"""Rebuilds the streams of a fused network, and every map that reads or writes them, in the order of the program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergekit_ot import RepairContext
from mergeot_repair.programs.maps import LinearMap
from mergeot_repair.programs.running import StagedRun
from mergeot_repair.refit.samples import rows_of
from mergeot_repair.refit.selection import Selection
from mergeot_repair.streams.between import mixes_values
from mergeot_repair.streams.branch_fit import MOST_INPUTS, BranchFit
from mergeot_repair.streams.branches import Branch, BranchFinder
from mergeot_repair.streams.finding import Stream
from mergeot_repair.streams.reading import Map
from mergeot_repair.streams.tying import tie_again
from mergeot_repair.streams.workspace import Workspace
from mergeot_repair.streams.writing import fit_writer, link_streams, write_images

# Places of a stream that are fitted to: more change nothing.
_PLACES = 50_000


class StreamRefit:
    """The streams of a fused network.

    Args:
        context: Of the repair.
        streams: The streams of the fused network.
        used: Numbers of the sources that have a weight.
        state: Of the fused network; it is changed.
        streams_of: Map → the value its result is added to, where that is fitted before.
    """

    def __init__(
        self,
        context: RepairContext,
        streams: Sequence[Stream],
        used: Sequence[int],
        state: dict[str, Tensor],
        streams_of: Mapping[str, str | None],
    ) -> None:
        shares = [context.model_weights[number] for number in used]
        sources = [context.sources[number] for number in used]
        total = sum(shares)
        self.work = Workspace(context, state, streams, sources, [share / total for share in shares], streams_of)
        slots = context.program.slots
        branches = BranchFinder(self.work.graph, self.work.nodes, slots, streams).find() if streams else []
        self.branches = {branch.writer.node: branch for branch in branches if self._fits(branch)}
        self.inner = {reader.node for branch in self.branches.values() for reader in branch.readers}
        self.writers = {writer.node: stream for stream in streams for writer in stream.roles.writers}
        self.kept: dict[str, list[list[int]]] = {"heads": [], "neurons": []}

    @property
    def groups(self) -> set[str]:
        """The groups that are chosen here."""
        return {branch.group for branch in self.branches.values()}

    def owns(self, linear_map: LinearMap) -> bool:
        """Whether a map is fitted here."""
        return linear_map.node in self.work.point_of or linear_map.node in self.writers

    def _fits(self, branch: Branch) -> bool:
        """Whether the units of all sources are such as the fused network has, and few enough to choose among."""
        graphs = self.work.graphs()
        units = sum(len(branch.columns(graph)) for graph in graphs)
        if branch.values is None:
            return units <= MOST_INPUTS
        shapes = set()
        for graph in (self.work.graph, *graphs):
            patterns = tuple(branch.rows(graph, reader).patterns.shape[1] for reader in branch.readers)
            shapes.add((patterns, branch.queries(graph)))
        return len(shapes) == 1 and mixes_values(branch, self.work.context)

    def prepare(
        self,
        batches: Sequence[tuple[Tensor, ...]],
        runs: Sequence[StagedRun],
        source_runs: Sequence[Sequence[StagedRun]],
    ) -> None:
        """Finds the fused streams, and writes what is an exact image of what the sources have.

        Args:
            batches: The inputs that are fitted to.
            runs: Of the fused network, one per batch.
            source_runs: Of each used source, one per batch.
        """
        if not self.work.streams:
            return
        values = [self.work.nodes[source].meta["val"] for source in self.work.points]
        places = max(value.numel() // value.shape[-1] for value in values)
        count = min(len(runs), -(-_PLACES // places))
        self.work = replace(
            self.work,
            batches=batches[:count],
            runs=runs[:count],
            source_runs=[of_source[:count] for of_source in source_runs],
        )
        link_streams(self.work)
        for stream in self.work.streams:
            write_images(self.work, stream)

    def fit(self, linear_map: LinearMap, selection: Selection) -> None:
        """Fits a map; those that read for a branch are fitted with the map that writes it."""
        if linear_map.node in self.work.point_of:
            if linear_map.node not in self.inner:
                self._write_reader(linear_map, selection)
            return
        stream = self.writers[linear_map.node]
        if linear_map.weight in stream.exact:
            return
        branch = self.branches.get(linear_map.node)
        if branch is None:
            start = torch.zeros(*rows_of(linear_map, self.work.state[linear_map.weight]).shape)
        else:
            fit = BranchFit(self.work, branch)
            start = fit.fit()
            self.kept["neurons" if branch.values is None else "heads"].append(fit.kept_of_sources())
        fit_writer(self.work, linear_map, stream, start)

    def _write_reader(self, linear_map: LinearMap, selection: Selection) -> None:
        """Writes a map that no branch reads: chosen neurons, or the mean of aligned ones."""
        maps = self.work.reader_maps(linear_map)
        chosen = selection.rows(linear_map.weight)
        if chosen is not None:
            weights, shifts = (torch.cat(of_maps)[chosen] for of_maps in _sides(maps))
            self.work.write(linear_map, Map(weights, shifts))
            return
        total = Map(torch.zeros(()), torch.zeros(()))
        for source, share, of_source in zip(self.work.sources, self.work.shares, maps, strict=True):
            weight = source.in_fused_order(of_source.weight, 0, linear_map.weight, linear_map.output_axis)
            shift = source.in_fused_order(of_source.shift, 0, linear_map.weight, linear_map.output_axis)
            total = Map(total.weight + share * weight, total.shift + share * shift)
        self.work.write(linear_map, total)

    def finish(self) -> None:
        """Ties embeddings that are read again, and tells the user what was done."""
        for stream in self.work.streams:
            tie_again(self.work, stream)
        if self.work.streams and self.work.context.note is not None:
            self.work.context.note(self._described())

    def _described(self) -> str:
        widths = ", ".join(f"{stream.size:,}" for stream in self.work.streams)
        what = "1 stream" if len(self.work.streams) == 1 else f"{len(self.work.streams)} streams"
        taken = []
        for kind, of_branches in self.kept.items():
            if of_branches:
                counts = torch.tensor(of_branches).sum(0).tolist()
                shares = [
                    f"{count:,} from source {source.number + 1}"
                    for count, source in zip(counts, self.work.sources, strict=True)
                ]
                taken.append(f"{sum(counts):,} {kind}: {', '.join(shares)}")
        start = f"Refit rebuilt {what} ({widths} neurons) from principal components"
        return f"{start}, and took over {'; '.join(taken)}." if taken else f"{start}."


def _sides(maps: Sequence[Map]) -> tuple[list[Tensor], list[Tensor]]:
    return [linear.weight for linear in maps], [linear.shift for linear in maps]
