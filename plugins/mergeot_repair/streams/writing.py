"""Writes what of a stream is an exact image of the sources', and fits the maps that write it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot import named_arguments
from mergeot_repair.programs.maps import LinearMap
from mergeot_repair.refit.regression import Sums
from mergeot_repair.refit.samples import regression_rows, rows_of
from mergeot_repair.streams.components import Components, linked
from mergeot_repair.streams.finding import Stream
from mergeot_repair.streams.places import rows_read
from mergeot_repair.streams.reading import Map, strength_for
from mergeot_repair.streams.workspace import Workspace


def link_streams(work: Workspace) -> None:
    """Finds the fused streams, from one pass over the sources."""
    for stream in work.streams:
        sizes = [graph.groups[stream.group].size for graph in work.graphs()]
        work.components[stream.group] = Components(stream, sizes, work.shares)
    points = sorted(work.points.values(), key=lambda point: work.order[point.source])
    for number in range(len(work.runs)):
        for point in points:
            rows = [rows_read(point, of_source[number]) for of_source in work.source_runs]
            streams, behind = ([pair[side] for pair in rows] for side in range(2))
            work.components[work.stream_at[point.source].group].add(point.source, streams, behind)
        for of_source in work.source_runs:
            of_source[number].release()
    for group, components in work.components.items():
        work.links[group] = components.links()


def write_images(work: Workspace, stream: Stream) -> None:
    """Writes embeddings, added parameters and maps of inputs, which a linear map of the stream takes over exactly.

    Norms get gains and shifts that are the same for all neurons: the maps that read them are fitted, and absorb them.
    """
    roles = stream.roles
    images = [*stream.images, *([] if roles.tie is None else [(roles.tie.weight, 1)])]
    for writer in roles.writers:
        if writer.weight in stream.exact:
            images.append((writer.weight, writer.output_axis))
            images += [] if writer.bias is None else [(writer.bias, 0)]
    for parameter, axis in images:
        values = [source.state[parameter].double() for source in work.sources]
        work.set(parameter, linked(values, work.links[stream.group], axis))
    for parameter, number in roles.gains.items():
        work.set(parameter, torch.full_like(work.state[parameter], number))
    for parameter, nodes in stream.offsets.items():
        number = max(_offset(stream, node) for node in nodes)
        work.set(parameter, torch.full_like(work.state[parameter], number))


def _offset(stream: Stream, node: str) -> float:
    """Returns what is added behind a norm: ones where maps without a bias read it, which can make one of them."""
    readers = [reader for point in stream.points if point.source == node for reader in point.readers]
    return float(stream.turns.fixes_ones and any(reader.bias is None for reader in readers))


def fit_writer(work: Workspace, writer: LinearMap, stream: Stream, start: Float[Tensor, "outputs inputs"]) -> None:
    """Fits a map that writes a stream to what the stream lacks there."""
    outputs, inputs = rows_of(writer, work.state[writer.weight]).shape
    sums = Sums(inputs, outputs)
    arguments = named_arguments(work.nodes[writer.node])
    for number, run in enumerate(work.runs):
        goals = work.goals(writer, stream, number)
        values = run.values_of([writer.source])[writer.source]
        sums.add(*regression_rows(writer, work.state[writer.weight], arguments, values, goals))
        work.settle(number)
    solution = sums.solve(start, writer.has_shift, strength_for(sums))
    work.write(writer, Map(solution.weight, solution.shift))
