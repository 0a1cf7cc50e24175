"""A fusion and where it went, as plain records."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mergekit_ot.fusion.extent import Extent
from mergekit_ot.fusion.options import NO_REPAIR
from mergekit_ot.fusion.result import FusionResult
from mergekit_ot.transport.problem import Status

# The same keys as `extent_facts`, where no neuron group was looked for.
_NOT_LOOKED_FOR = {
    "aligned_groups": 0,
    "neuron_groups": None,
    "pinned_weights_percent": None,
    "pinned_because": [],
}


@dataclass(frozen=True)
class FusionOutcome:
    """A fusion and where it went; `output` is None for a dry run."""

    output: str | None
    solver: str
    result: FusionResult

    def as_json(self) -> dict[str, Any]:
        """Returns the object of ``mergeot fuse --json``."""
        content = {
            "output": self.output,
            "solver": self.solver,
            "groups": self._groups() if self.result.is_traced else [],
            "aligned_sources_max_error": self.result.aligned_sources_max_error,
            "seconds": self.result.seconds,
            **(extent_facts(self.result.extent) if self.result.is_traced else _NOT_LOOKED_FOR),
            "notes": list(self.result.notes),
            "warnings": list(self.result.warnings),
        }
        if self.output is None:
            content["plan"] = self.result.plan.describe()
        comparison = self.result.repair_comparison
        if self.result.alone is not None:
            content["source_alone"] = self.result.alone
        if self.result.deepened:
            content["deepened"] = [deepening.as_json() for deepening in self.result.deepened]
        if self.result.growth is not None:
            content["widened"] = self.result.growth.as_json()
        if comparison is None:
            return content
        content["comparison"] = comparison.as_json()
        is_older = comparison.repair != NO_REPAIR or self.result.options.fallback
        return {**content, "repair": content["comparison"]} if is_older else content

    def _groups(self) -> list[dict[str, Any]]:
        """Returns the neuron groups: how they were aligned or, of a dry run, which would be."""
        if self.output is not None:
            return group_rows(self.result)
        groups = self.result.alignment.target.groups
        keys = [key for step in self.result.plan.steps for key in step.groups]
        unknown = {"cost": None, "status": "planned", "solver": self.solver}
        return [{"name": key, "size": groups[key].size, **unknown} for key in keys]


def extent_facts(extent: Extent) -> dict[str, Any]:
    """Returns how much was aligned, as plain data."""
    return {
        "aligned_groups": extent.aligned,
        "neuron_groups": extent.groups,
        "pinned_weights_percent": extent.pinned_percent,
        "pinned_because": list(extent.reasons),
    }


def group_rows(result: FusionResult) -> list[dict[str, Any]]:
    """Returns one plain record per neuron group."""
    return [
        {
            "name": group.name,
            "size": group.size,
            "cost": group.cost,
            "status": status_word(group.status),
            "solver": group.solver,
        }
        for group in result.groups
    ]


def status_word(status: Status) -> str:
    """Returns a solver's status as one word."""
    return status.name.lower()
