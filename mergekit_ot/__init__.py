"""Fuse neural networks that were trained independently, by optimal transport."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mergekit_ot.hookspecs import hookimpl

__version__ = "0.2.0.dev0"

# Names are imported on first use: `mergeot --help` and `mergeot plugins` must not pay for torch.
_HOMES = {
    "AbstractBarycenterSolver": "mergekit_ot.transport.solver",
    "Barycenter": "mergekit_ot.transport.solver",
    "BarycenterProblem": "mergekit_ot.transport.solver",
    "Scope": "mergekit_ot.transport.solver",
    "Start": "mergekit_ot.transport.solver",
    "Status": "mergekit_ot.transport.solver",
    "Coupling": "mergekit_ot.transport.measure",
    "NeuronMeasure": "mergekit_ot.transport.measure",
    "Signs": "mergekit_ot.transport.measure",
    "barycenter_cost": "mergekit_ot.transport.fused",
    "couple": "mergekit_ot.transport.ground_cost",
    "couple_apart": "mergekit_ot.transport.apart",
    "has_room": "mergekit_ot.transport.apart",
    "placed_measure": "mergekit_ot.transport.apart",
    "support_merge_cost": "mergekit_ot.transport.apart",
    "averaged_support": "mergekit_ot.transport.fused",
    "fused_measure": "mergekit_ot.transport.fused",
    "ground_cost": "mergekit_ot.transport.ground_cost",
    "in_order_of": "mergekit_ot.transport.fused",
    "independent_coupling": "mergekit_ot.transport.fused",
    "rounding_error": "mergekit_ot.transport.fused",
    "transport_cost": "mergekit_ot.transport.fused",
    "unsolved": "mergekit_ot.transport.fused",
    "uniform_mass": "mergekit_ot.transport.measure",
    "SolverError": "mergekit_ot.errors",
    "RecipeError": "mergekit_ot.errors",
    "EinRule": "mergekit_ot.graph.rule",
    "NodeRule": "mergekit_ot.graph.rule",
    "FunctionRule": "mergekit_ot.graph.rule",
    "OperationView": "mergekit_ot.graph.rule",
    "RuleError": "mergekit_ot.graph.rule",
    "AbstractFrontEnd": "mergekit_ot.graph.front_end",
    "TraceBudget": "mergekit_ot.graph.front_end",
    "TraceLimits": "mergekit_ot.graph.front_end",
    "ExportFrontEnd": "mergekit_ot.graph.capture",
    "CapturedProgram": "mergekit_ot.graph.program",
    "ProgramSlot": "mergekit_ot.graph.program",
    "ModelGraph": "mergekit_ot.graph.ir",
    "trace_model": "mergekit_ot.graph.trace",
    "check_model": "mergekit_ot.graph.verify",
    "fuse": "mergekit_ot.fusion.engine",
    "FusionResult": "mergekit_ot.fusion.result",
    "StepReport": "mergekit_ot.fusion.result",
    "AbstractNodeMeasure": "mergekit_ot.fusion.measures",
    "GroupView": "mergekit_ot.fusion.measures",
    "AbstractExecutor": "mergekit_ot.fusion.plan",
    "Step": "mergekit_ot.fusion.plan",
    "AbstractRepair": "mergekit_ot.fusion.repair",
    "RepairContext": "mergekit_ot.fusion.repair",
    "RepairSource": "mergekit_ot.fusion.repair",
    "SourceModel": "mergekit_ot.fusion.source",
    "Checkpoint": "mergekit_ot.checkpoint",
    "load_checkpoint": "mergekit_ot.checkpoint",
    "save_checkpoint": "mergekit_ot.checkpoint",
    "evaluate": "mergekit_ot.evaluation",
    "barrier": "mergekit_ot.interpolation",
    "plane": "mergekit_ot.landscape",
    "plot_barrier": "mergekit_ot.pictures",
    "plot_plane": "mergekit_ot.plane_picture",
    "Architecture": "mergekit_ot.specs",
    "resolve_architecture": "mergekit_ot.specs",
    "resolve_data": "mergekit_ot.datasets",
    "PluginManager": "mergekit_ot.plugin_manager",
    "default_manager": "mergekit_ot.plugin_manager",
    "MergeotError": "mergekit_ot.errors",
    "DataError": "mergekit_ot.errors",
    "CheckpointError": "mergekit_ot.errors",
    "ArchitectureError": "mergekit_ot.errors",
}

__all__ = ["__version__", "hookimpl", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'mergekit_ot' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from mergekit_ot.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
    from mergekit_ot.datasets import resolve_data
    from mergekit_ot.errors import (
        ArchitectureError,
        CheckpointError,
        DataError,
        MergeotError,
        RecipeError,
        SolverError,
    )
    from mergekit_ot.evaluation import evaluate
    from mergekit_ot.fusion.engine import fuse
    from mergekit_ot.fusion.measures import AbstractNodeMeasure, GroupView
    from mergekit_ot.fusion.plan import AbstractExecutor, Step
    from mergekit_ot.fusion.repair import AbstractRepair, RepairContext, RepairSource
    from mergekit_ot.fusion.result import FusionResult, StepReport
    from mergekit_ot.fusion.source import SourceModel
    from mergekit_ot.graph.capture import ExportFrontEnd
    from mergekit_ot.graph.front_end import AbstractFrontEnd, TraceBudget, TraceLimits
    from mergekit_ot.graph.ir import ModelGraph
    from mergekit_ot.graph.program import CapturedProgram, ProgramSlot
    from mergekit_ot.graph.rule import EinRule, FunctionRule, NodeRule, OperationView, RuleError
    from mergekit_ot.graph.trace import trace_model
    from mergekit_ot.graph.verify import check_model
    from mergekit_ot.interpolation import barrier
    from mergekit_ot.landscape import plane
    from mergekit_ot.pictures import plot_barrier
    from mergekit_ot.plane_picture import plot_plane
    from mergekit_ot.plugin_manager import PluginManager, default_manager
    from mergekit_ot.specs import Architecture, resolve_architecture
    from mergekit_ot.transport.apart import couple_apart, has_room, placed_measure, support_merge_cost
    from mergekit_ot.transport.fused import (
        averaged_support,
        barycenter_cost,
        fused_measure,
        in_order_of,
        independent_coupling,
        rounding_error,
        transport_cost,
        unsolved,
    )
    from mergekit_ot.transport.ground_cost import couple, ground_cost
    from mergekit_ot.transport.measure import Coupling, NeuronMeasure, Signs, uniform_mass
    from mergekit_ot.transport.solver import (
        AbstractBarycenterSolver,
        Barycenter,
        BarycenterProblem,
        Scope,
        Start,
        Status,
    )
