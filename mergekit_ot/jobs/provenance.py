"""What a fused file says about where it comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_ot.fusion.options import NO_REPAIR
from mergekit_ot.fusion.result import FusionResult
from mergekit_ot.recipe import FusionRecipe
from mergekit_ot.sources.portable import portable_spec, portable_value
from mergekit_ot.sources.reading import ReadSource
from mergekit_ot.sources.specs import Architecture


def what_was_measured(result: FusionResult) -> dict[str, Any]:
    """Returns what was measured on the way: how true aligned sources are, and which network is the result."""
    comparison = result.repair_comparison
    checked: dict[str, Any] = {"aligned_sources_max_error": result.aligned_sources_max_error}
    if result.alone is not None:
        return {**checked, "source_alone": result.alone}
    if comparison is None or comparison.repair == NO_REPAIR:
        return checked
    return {**checked, "is_repaired": comparison.is_written}


def provenance_of(recipe: FusionRecipe, sources: list[ReadSource], fused_as: Architecture) -> dict[str, Any]:
    """Returns which files were fused and how, as plain data; no path of a machine."""
    from mergekit_ot import __version__

    return {
        "made_by": f"mergekit_ot {__version__}",
        "solver": recipe.solver,
        "solver_options": {key: portable_value(value) for key, value in recipe.solver_options.items()},
        "measure": recipe.measure,
        "repair": recipe.repair,
        "repair_options": {key: portable_value(value) for key, value in recipe.repair_options.items()},
        "refine": recipe.refine,
        "restarts": recipe.restarts,
        "seed": recipe.seed,
        "target": portable_spec(recipe.target) if isinstance(recipe.target, str) else recipe.target,
        "arch": portable_spec(fused_as.name),
        "keep": list(recipe.keep),
        "head": recipe.head,
        "sources": [
            {"name": Path(source.name).name, "sha256": source.checkpoint.sha256, "weight": weight}
            for source, weight in zip(sources, recipe.weights, strict=True)
        ],
    }
