"""Graphs of earlier runs: looked up by a digest of all that they depend on, and kept as plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from mergekit_ot.errors import ArchitectureError
from mergekit_ot.graph.capture.description import ModuleDescription, Undescribed
from mergekit_ot.graph.capture.fingerprint import architecture_digest, text_digest
from mergekit_ot.graph.capture.front_end import EXPORT
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.stored import StoredGraphError, graph_as_plain, graph_from_plain
from mergekit_ot.storage.kept import KeptRecords


@dataclass(frozen=True)
class TraceMemory:
    """Where graphs are looked up that were traced in one way.

    Attributes:
        records: Where they are kept.
        way: Digest of what traces: rules, front ends, limits, inputs.
    """

    records: KeptRecords
    way: str

    def key(self, model: nn.Module, description: ModuleDescription) -> str | None:
        """Returns what the graph of a module is kept under; None where something about it has no value."""
        try:
            modes = (module.training for module in model.modules())
            return text_digest(self.way, architecture_digest(description, modes))
        except Undescribed:
            return None

    def recall(self, key: str, model: nn.Module, trace: Callable[[], ModelGraph]) -> ModelGraph | None:
        """Returns the graph that is kept under a key, or None; `trace` gives it anew where its program is needed."""
        shapes = {name: value.shape for name, value in (*model.named_parameters(), *model.named_buffers())}
        kept: list[ModelGraph] = []

        def program() -> Any:
            fresh = trace()
            if (fresh.layouts, fresh.groups) != (kept[0].layouts, kept[0].groups):
                raise ArchitectureError(
                    f"The kept trace of '{type(model).__name__}' is not that of its code: something that the code "
                    "depends on has changed unnoticed. Run 'mergeot cache --clear', then this again; MERGEOT_CACHE=off "
                    "keeps no traces."
                )
            return fresh.program

        try:
            kept.append(graph_from_plain(self.records.read(key), shapes, program))
        except StoredGraphError:
            return None
        return kept[0]

    def keep(self, key: str, graph: ModelGraph) -> None:
        """Keeps a graph, unless it depends on the numbers in the inputs or the weights as well."""
        if graph.program is not None and graph.program.front_end == EXPORT:
            self.records.write(key, graph_as_plain(graph))
