"""Fuse neural networks that were trained independently, by optimal transport."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from mergekit_ot.hooks.hookspecs import hookimpl

__version__ = "0.2.0.dev0"

# Names are imported on first use: `mergeot --help` and `mergeot plugins` must not pay for torch.
_HOMES = {
    "AbstractDeferredSupport": "mergekit_ot.transport.support",
    "AbstractBarycenterSolver": "mergekit_ot.transport.solver",
    "Barycenter": "mergekit_ot.transport.problem",
    "BarycenterProblem": "mergekit_ot.transport.problem",
    "Scope": "mergekit_ot.transport.solver",
    "Start": "mergekit_ot.transport.solver",
    "Status": "mergekit_ot.transport.problem",
    "Solution": "mergekit_ot.transport.problem",
    "Coupling": "mergekit_ot.transport.coupling",
    "Permutation": "mergekit_ot.transport.permutation",
    "InvertibleMap": "mergekit_ot.transport.invertible",
    "ROTATIONS": "mergekit_ot.transport.measure",
    "couple_rows": "mergekit_ot.transport.directions",
    "Plan": "mergekit_ot.transport.plan",
    "PairCosts": "mergekit_ot.transport.ascent",
    "NeuronMeasure": "mergekit_ot.transport.measure",
    "Signs": "mergekit_ot.transport.measure",
    "barycenter_cost": "mergekit_ot.transport.barycenter",
    "couple": "mergekit_ot.transport.ground_cost",
    "couple_apart": "mergekit_ot.transport.apart",
    "has_room": "mergekit_ot.transport.apart",
    "placed_measure": "mergekit_ot.transport.apart",
    "support_merge_cost": "mergekit_ot.transport.apart",
    "averaged_support": "mergekit_ot.transport.barycenter",
    "fused_measure": "mergekit_ot.transport.barycenter",
    "ground_cost": "mergekit_ot.transport.ground_cost",
    "measure_cost": "mergekit_ot.transport.ground_cost",
    "in_order_of": "mergekit_ot.transport.barycenter",
    "independent_coupling": "mergekit_ot.transport.barycenter",
    "realign": "mergekit_ot.transport.realignment",
    "realigned": "mergekit_ot.transport.realignment",
    "rounding_error": "mergekit_ot.transport.barycenter",
    "support_barycenter": "mergekit_ot.transport.barycenter",
    "transport_cost": "mergekit_ot.transport.barycenter",
    "unsolved": "mergekit_ot.transport.barycenter",
    "squarable": "mergekit_ot.transport.scale",
    "uniform_mass": "mergekit_ot.transport.measure",
    "Notify": "mergekit_ot.progress",
    "Progress": "mergekit_ot.progress",
    "SolverError": "mergekit_ot.errors",
    "RecipeError": "mergekit_ot.errors",
    "ResultError": "mergekit_ot.errors",
    "EinRule": "mergekit_ot.graph.rules.einrule",
    "NodeRule": "mergekit_ot.graph.rules.rule",
    "FunctionRule": "mergekit_ot.graph.rules.rule",
    "OperationView": "mergekit_ot.graph.rules.rule",
    "RuleError": "mergekit_ot.graph.rules.rule",
    "AbstractFrontEnd": "mergekit_ot.graph.capture.front_end",
    "TraceBudget": "mergekit_ot.graph.capture.front_end",
    "TraceLimits": "mergekit_ot.graph.capture.front_end",
    "ExportFrontEnd": "mergekit_ot.graph.capture.capture",
    "outputs_of": "mergekit_ot.graph.capture.outputs",
    "tensors_of": "mergekit_ot.graph.capture.outputs",
    "CapturedProgram": "mergekit_ot.graph.capture.program",
    "ProgramSlot": "mergekit_ot.graph.capture.program",
    "ModelGraph": "mergekit_ot.graph.ir",
    "trace_model": "mergekit_ot.api",
    "check_model": "mergekit_ot.api",
    "fuse": "mergekit_ot.api",
    "FusionResult": "mergekit_ot.fusion.result",
    "StepReport": "mergekit_ot.fusion.step_report",
    "AbstractNodeMeasure": "mergekit_ot.fusion.node_measure",
    "GroupView": "mergekit_ot.fusion.group_view",
    "AbstractExecutor": "mergekit_ot.fusion.executor",
    "Step": "mergekit_ot.fusion.plan",
    "StepSolution": "mergekit_ot.fusion.task",
    "StepTask": "mergekit_ot.fusion.task",
    "TaskQueue": "mergekit_ot.fusion.executor",
    "run_task": "mergekit_ot.fusion.task",
    "FusionInputs": "mergekit_ot.fusion.setup",
    "FusionOptions": "mergekit_ot.fusion.options",
    "fuse_with": "mergekit_ot.api",
    "resized": "mergekit_ot.fusion.growth.resizing",
    "deepen": "mergekit_ot.fusion.depth.deepening",
    "Deepening": "mergekit_ot.fusion.depth.deepening",
    "MultiHead": "mergekit_ot.fusion.heads",
    "ResponseGrams": "mergekit_ot.fusion.responses",
    "AbstractRepair": "mergekit_ot.fusion.repair",
    "RepairContext": "mergekit_ot.fusion.repair",
    "RepairSource": "mergekit_ot.fusion.repair",
    "Aim": "mergekit_ot.fusion.predictions",
    "Disagreement": "mergekit_ot.fusion.predictions",
    "Divergence": "mergekit_ot.fusion.predictions",
    "axis_of_classes": "mergekit_ot.fusion.predictions",
    "ensemble_outputs": "mergekit_ot.fusion.predictions",
    "mean_probabilities": "mergekit_ot.fusion.predictions",
    "probabilities_of": "mergekit_ot.fusion.predictions",
    "SourceModel": "mergekit_ot.fusion.source",
    "AbstractForm": "mergekit_ot.storage.forms",
    "Checkpoint": "mergekit_ot.storage.record",
    "load_checkpoint": "mergekit_ot.api",
    "save_checkpoint": "mergekit_ot.api",
    "DataNeeds": "mergekit_ot.scoring.requests",
    "DataRequest": "mergekit_ot.scoring.requests",
    "DataReader": "mergekit_ot.scoring.requests",
    "Metric": "mergekit_ot.scoring.metrics",
    "evaluate": "mergekit_ot.scoring.evaluation",
    "barrier": "mergekit_ot.scoring.path",
    "plane": "mergekit_ot.scoring.plane",
    "plane_frame": "mergekit_ot.scoring.plane",
    "score_plane": "mergekit_ot.scoring.plane",
    "plot_barrier": "mergekit_ot.pictures.curves",
    "plot_plane": "mergekit_ot.pictures.plane",
    "check_picture_path": "mergekit_ot.pictures.curves",
    "save_figure": "mergekit_ot.pictures.figures",
    "Architecture": "mergekit_ot.sources.specs",
    "Guess": "mergekit_ot.sources.guesses",
    "resolve_architecture": "mergekit_ot.sources.specs",
    "resolve_data": "mergekit_ot.sources.datasets",
    "ModelFiles": "mergekit_ot.sources.opening",
    "OpenedModels": "mergekit_ot.sources.opening",
    "PluginManager": "mergekit_ot.hooks.manager",
    "default_manager": "mergekit_ot.hooks.manager",
    "printable": "mergekit_ot.text",
    "MergeotError": "mergekit_ot.errors",
    "DataError": "mergekit_ot.errors",
    "CheckpointError": "mergekit_ot.errors",
    "ArchitectureError": "mergekit_ot.errors",
    "Value": "mergekit_ot.graph.rules.rule",
    "Labels": "mergekit_ot.graph.rules.rule",
    "Atom": "mergekit_ot.graph.axes.expressions",
    "Case": "mergekit_ot.graph.axes.expressions",
    "Replicated": "mergekit_ot.graph.axes.expressions",
    "SlotKind": "mergekit_ot.graph.capture.program",
    "named_arguments": "mergekit_ot.graph.capture.program",
    "operation_name": "mergekit_ot.graph.capture.program",
    "operation_schema": "mergekit_ot.graph.capture.program",
    "AxisLayout": "mergekit_ot.graph.layouts",
    "NeuronGroup": "mergekit_ot.graph.ir",
    "Neurons": "mergekit_ot.graph.layouts",
    "Fixed": "mergekit_ot.graph.layouts",
    "Factors": "mergekit_ot.graph.layouts",
    "Blocks": "mergekit_ot.graph.layouts",
    "Choice": "mergekit_ot.graph.layouts",
    "layout_size": "mergekit_ot.graph.layouts",
    "leaf_groups": "mergekit_ot.graph.layouts",
    "OUT": "mergekit_ot.graph.layouts",
    "IN": "mergekit_ot.graph.layouts",
    "Alignment": "mergekit_ot.fusion.alignment",
    "Block": "mergekit_ot.graph.blocks",
    "AbstractProof": "mergekit_ot.graph.symmetry.symmetry",
    "AbstractSymmetry": "mergekit_ot.graph.symmetry.symmetry",
    "Places": "mergekit_ot.graph.symmetry.symmetry",
    "Order": "mergekit_ot.graph.symmetry.permutation",
    "Sign": "mergekit_ot.graph.symmetry.signs",
    "AbstractRotation": "mergekit_ot.graph.symmetry.rotations",
    "Orthogonal": "mergekit_ot.graph.symmetry.rotations",
    "OrthogonalWithFixedMean": "mergekit_ot.graph.symmetry.rotations",
    "RotaryPlanes": "mergekit_ot.graph.symmetry.rotations",
    "Invertible": "mergekit_ot.graph.symmetry.invertible",
    "PositiveScale": "mergekit_ot.graph.symmetry.scales",
    "Limit": "mergekit_ot.storage.limits",
    "MappedFile": "mergekit_ot.storage.regular",
    "carried_by": "mergekit_ot.storage.record",
    "check_tensor_name": "mergekit_ot.storage.limits",
    "MemoryStore": "mergekit_ot.storage.store",
    "StoreWriter": "mergekit_ot.storage.store",
    "AbstractFileWriter": "mergekit_ot.storage.file_writer",
    "check_output": "mergekit_ot.storage.outputs",
    "torch_stream": "mergekit_ot.storage.torch_stream",
    "write_text": "mergekit_ot.storage.files",
    "TensorStore": "mergekit_ot.storage.store",
}

__all__ = ["__version__", "hookimpl", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'mergekit_ot' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


if TYPE_CHECKING:
    from mergekit_ot.api import check_model, fuse, fuse_with, load_checkpoint, save_checkpoint, trace_model
    from mergekit_ot.errors import (
        ArchitectureError,
        CheckpointError,
        DataError,
        MergeotError,
        RecipeError,
        ResultError,
        SolverError,
    )
    from mergekit_ot.fusion.alignment import Alignment
    from mergekit_ot.fusion.depth.deepening import Deepening, deepen
    from mergekit_ot.fusion.executor import AbstractExecutor, TaskQueue
    from mergekit_ot.fusion.group_view import GroupView
    from mergekit_ot.fusion.growth.resizing import resized
    from mergekit_ot.fusion.heads import MultiHead
    from mergekit_ot.fusion.node_measure import AbstractNodeMeasure
    from mergekit_ot.fusion.options import FusionOptions
    from mergekit_ot.fusion.plan import Step
    from mergekit_ot.fusion.predictions import (
        Aim,
        Disagreement,
        Divergence,
        axis_of_classes,
        ensemble_outputs,
        mean_probabilities,
        probabilities_of,
    )
    from mergekit_ot.fusion.repair import AbstractRepair, RepairContext, RepairSource
    from mergekit_ot.fusion.responses import ResponseGrams
    from mergekit_ot.fusion.result import FusionResult
    from mergekit_ot.fusion.setup import FusionInputs
    from mergekit_ot.fusion.source import SourceModel
    from mergekit_ot.fusion.step_report import StepReport
    from mergekit_ot.fusion.task import StepSolution, StepTask, run_task
    from mergekit_ot.graph.axes.expressions import Atom, Case, Replicated
    from mergekit_ot.graph.blocks import Block
    from mergekit_ot.graph.capture.capture import ExportFrontEnd
    from mergekit_ot.graph.capture.front_end import AbstractFrontEnd, TraceBudget, TraceLimits
    from mergekit_ot.graph.capture.outputs import outputs_of, tensors_of
    from mergekit_ot.graph.capture.program import (
        CapturedProgram,
        ProgramSlot,
        SlotKind,
        named_arguments,
        operation_name,
        operation_schema,
    )
    from mergekit_ot.graph.ir import ModelGraph, NeuronGroup
    from mergekit_ot.graph.layouts import (
        IN,
        OUT,
        AxisLayout,
        Blocks,
        Choice,
        Factors,
        Fixed,
        Neurons,
        layout_size,
        leaf_groups,
    )
    from mergekit_ot.graph.rules.einrule import EinRule
    from mergekit_ot.graph.rules.rule import FunctionRule, Labels, NodeRule, OperationView, RuleError, Value
    from mergekit_ot.graph.symmetry.invertible import Invertible
    from mergekit_ot.graph.symmetry.permutation import Order
    from mergekit_ot.graph.symmetry.rotations import (
        AbstractRotation,
        Orthogonal,
        OrthogonalWithFixedMean,
        RotaryPlanes,
    )
    from mergekit_ot.graph.symmetry.scales import PositiveScale
    from mergekit_ot.graph.symmetry.signs import Sign
    from mergekit_ot.graph.symmetry.symmetry import AbstractProof, AbstractSymmetry, Places
    from mergekit_ot.hooks.manager import PluginManager, default_manager
    from mergekit_ot.pictures.curves import check_picture_path, plot_barrier
    from mergekit_ot.pictures.figures import save_figure
    from mergekit_ot.pictures.plane import plot_plane
    from mergekit_ot.progress import Notify, Progress
    from mergekit_ot.scoring.evaluation import evaluate
    from mergekit_ot.scoring.metrics import Metric
    from mergekit_ot.scoring.path import barrier
    from mergekit_ot.scoring.plane import plane, plane_frame, score_plane
    from mergekit_ot.scoring.requests import DataNeeds, DataReader, DataRequest
    from mergekit_ot.sources.datasets import resolve_data
    from mergekit_ot.sources.guesses import Guess
    from mergekit_ot.sources.opening import ModelFiles, OpenedModels
    from mergekit_ot.sources.specs import Architecture, resolve_architecture
    from mergekit_ot.storage.file_writer import AbstractFileWriter
    from mergekit_ot.storage.files import write_text
    from mergekit_ot.storage.forms import AbstractForm
    from mergekit_ot.storage.limits import Limit, check_tensor_name
    from mergekit_ot.storage.outputs import check_output
    from mergekit_ot.storage.record import Checkpoint, carried_by
    from mergekit_ot.storage.regular import MappedFile
    from mergekit_ot.storage.store import MemoryStore, StoreWriter, TensorStore
    from mergekit_ot.storage.torch_stream import torch_stream
    from mergekit_ot.text import printable
    from mergekit_ot.transport.apart import couple_apart, has_room, placed_measure, support_merge_cost
    from mergekit_ot.transport.ascent import PairCosts
    from mergekit_ot.transport.barycenter import (
        averaged_support,
        barycenter_cost,
        fused_measure,
        in_order_of,
        independent_coupling,
        rounding_error,
        support_barycenter,
        transport_cost,
        unsolved,
    )
    from mergekit_ot.transport.coupling import Coupling
    from mergekit_ot.transport.directions import couple_rows
    from mergekit_ot.transport.ground_cost import couple, ground_cost, measure_cost
    from mergekit_ot.transport.invertible import InvertibleMap
    from mergekit_ot.transport.measure import ROTATIONS, NeuronMeasure, Signs, uniform_mass
    from mergekit_ot.transport.permutation import Permutation
    from mergekit_ot.transport.plan import Plan
    from mergekit_ot.transport.problem import Barycenter, BarycenterProblem, Solution, Status
    from mergekit_ot.transport.realignment import realign, realigned
    from mergekit_ot.transport.scale import squarable
    from mergekit_ot.transport.solver import AbstractBarycenterSolver, Scope, Start
    from mergekit_ot.transport.support import AbstractDeferredSupport
