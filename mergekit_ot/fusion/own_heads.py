"""Networks that differ from the fused one by the sizes of their heads: built, so that aligned copies can be run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from mergekit_ot.fusion.alignment import Alignment
from mergekit_ot.fusion.running import Inputs, Runner
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.graph.layouts import layout_size

Sizes = Mapping[str, tuple[int, ...]]


def own_sizes(alignment: Alignment, source: int) -> Sizes:
    """Returns parameter → shape of an aligned source, for those that differ in it from the fused model."""
    found = {}
    for name in sorted(alignment.uncompared):
        shape, fused = (
            tuple(map(layout_size, layouts))
            for layouts in (alignment.moved_layouts(source, name), alignment.target.layouts[name])
        )
        if shape != fused:
            found[name] = shape
    return found


class CopyRunners:
    """What runs aligned copies of sources: the fused network, built once for all, with heads of a source's own size.

    Args:
        target: The fused network.
        inputs: What they are run with.
        alignment: The couplings.
    """

    def __init__(self, target: SourceModel, inputs: Inputs, alignment: Alignment) -> None:
        self.fused, self._alignment = Runner(target, inputs), alignment
        self._others: dict[int, Runner] = {}

    def of(self, number: int) -> Runner:
        """Returns what runs the aligned copy of a source."""
        sizes = own_sizes(self._alignment, number)
        if sizes and number not in self._others:
            model = with_sizes(self.fused.model, sizes, self._alignment.target.aliases)
            self._others[number] = Runner(model, self.fused.inputs)
        return self._others[number] if sizes else self.fused


def with_sizes(model: SourceModel, sizes: Sizes, aliases: Mapping[str, str]) -> SourceModel:
    """Returns a network some of whose parameters have other shapes: layers read their sizes off their weights.

    Args:
        model: The network.
        sizes: Parameter → its shape.
        aliases: Further name of a tied parameter → the name in `sizes`.
    """

    def make() -> nn.Module:
        built = model.architecture.built()
        names = {name: name for name in sizes} | {name: own for name, own in aliases.items() if own in sizes}
        made: dict[str, nn.Parameter] = {}
        for name, own in names.items():
            path, _, last = name.rpartition(".")
            held = built.get_parameter(name)
            if own not in made:
                empty = torch.zeros(sizes[own], dtype=held.dtype, device=held.device)
                made[own] = nn.Parameter(empty, requires_grad=False)
            setattr(built.get_submodule(path), last, made[own])
        return built

    return SourceModel(model.name, make, model.state)
