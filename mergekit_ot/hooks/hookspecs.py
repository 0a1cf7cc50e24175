"""Every hook of the package: the whole surface on which plugins extend it.

A plugin is a module (or object) registered under the entry-point group ``mergekit_ot`` whose functions carry
`mergekit_ot.hookimpl`. Hooks that register things return a mapping ``name -> thing``; a thing may be given as an
import string ``"package.module:attribute"``, so that listing plugins never imports torch. None takes a registrar.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import typer
    from torch import Tensor

    from mergekit_ot.fusion.executor import AbstractExecutor
    from mergekit_ot.fusion.node_measure import AbstractNodeMeasure
    from mergekit_ot.fusion.repair import AbstractRepair
    from mergekit_ot.fusion.step_report import StepReport
    from mergekit_ot.graph.capture.front_end import AbstractFrontEnd
    from mergekit_ot.graph.rules.rule import NodeRule
    from mergekit_ot.graph.symmetry.symmetry import AbstractSymmetry
    from mergekit_ot.scoring.requests import DataReader, DataRequest
    from mergekit_ot.storage.record import Checkpoint
    from mergekit_ot.transport.solver import AbstractBarycenterSolver

PROJECT = "mergekit_ot"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def mergeot_node_rules() -> Mapping[str, NodeRule | str]:  # type: ignore[empty-body]
    """Return node rules by operation (``"aten.linear"``, ``"aten.max.dim"``) or module (``"module:Experts"``)."""


@hookspec
def mergeot_front_ends() -> Mapping[str, type[AbstractFrontEnd] | str]:  # type: ignore[empty-body]
    """Return front ends (ways to capture a module as a graph of operations) by name."""


@hookspec
def mergeot_symmetries() -> Mapping[str, type[AbstractSymmetry] | str]:  # type: ignore[empty-body]
    """Return symmetries (what may be done to the neurons of a group without changing the function) by name."""


@hookspec
def mergeot_node_measures() -> Mapping[str, type[AbstractNodeMeasure] | str]:  # type: ignore[empty-body]
    """Return node measures (what a neuron is seen by) by name."""


@hookspec
def mergeot_solvers() -> Mapping[str, type[AbstractBarycenterSolver] | str]:  # type: ignore[empty-body]
    """Return barycenter solvers by name."""


@hookspec
def mergeot_architectures() -> Mapping[str, Callable[..., Any] | str]:  # type: ignore[empty-body]
    """Return architectures by name: callables with plain keyword arguments that build an ``nn.Module``."""


@hookspec
def mergeot_architecture_libraries() -> Mapping[str, Callable[..., Any] | str]:  # type: ignore[empty-body]
    """Return libraries of architectures by prefix of a SPEC: callables of a name and keywords that build a module."""


@hookspec
def mergeot_guesses() -> Mapping[str, Callable[..., Any] | str]:  # type: ignore[empty-body]
    """Return what guesses an architecture from the names and shapes of a file, by the name that confirms the guess."""


@hookspec
def mergeot_datasets() -> Mapping[str, Callable[..., Any] | str]:  # type: ignore[empty-body]
    """Return data sets by name: callables with plain keyword arguments that give (inputs, targets) batches."""


@hookspec(firstresult=True)
def mergeot_open_data(request: DataRequest) -> DataReader | None:
    """Return what reads the data at ``request.path`` for a network, or None where they are not yours; run no code."""


@hookspec(firstresult=True)
def mergeot_load_checkpoint(path: Path, is_trusted: bool) -> Checkpoint | None:
    """Return the checkpoint at `path`, or None where the format is not yours; run nothing of what is not trusted."""


@hookspec
def mergeot_check_output(path: Path, template: Checkpoint | None) -> None:
    """Raise where no checkpoint can be written to `path` with the program of `template`, before any work is done."""


@hookspec(firstresult=True)
def mergeot_save_checkpoint(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> bool | None:
    """Write `state` and plain `metadata` to `path` and return True, or None where the format is not this plugin's."""


@hookspec
def mergeot_executors() -> Mapping[str, type[AbstractExecutor] | str]:  # type: ignore[empty-body]
    """Return executors (what runs the steps of a fusion plan) by name."""


@hookspec
def mergeot_step_done(report: StepReport) -> None:
    """Observe that one step of a fusion is done; nothing returned is used."""


@hookspec
def mergeot_repairs() -> Mapping[str, type[AbstractRepair] | str]:  # type: ignore[empty-body]
    """Return repairs (what is done to the fused model after the couplings) by name."""


@hookspec
def mergeot_commands(app: typer.Typer) -> None:
    """Add commands to the command line's `app`; import nothing heavy before a command runs."""
