"""Names become things, with the installed plugins by default: the public functions of the package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mergekit_ot.errors import CheckpointError
from mergekit_ot.fusion.engine import run_fusion
from mergekit_ot.fusion.executor import AbstractExecutor
from mergekit_ot.fusion.options import FusionOptions
from mergekit_ot.fusion.result import FusionResult
from mergekit_ot.fusion.setup import FusionInputs
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.graph.capture.front_end import AUTO, TraceLimits
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.hooks.checking import check_model as check_model
from mergekit_ot.hooks.formats import check_format, readers, writers
from mergekit_ot.hooks.manager import PluginManager, default_manager
from mergekit_ot.hooks.preparing import GivenMethods, prepare
from mergekit_ot.progress import Progress
from mergekit_ot.storage.checkpoint import load, save
from mergekit_ot.storage.kept import KeptRecords
from mergekit_ot.storage.record import FORMAT, VERSION, Checkpoint
from mergekit_ot.threads import threads_for
from mergekit_ot.transport.solver import AbstractBarycenterSolver


def trace_model(
    model: nn.Module,
    example_inputs: Tensor | tuple[object, ...],
    manager: PluginManager | None = None,
    *,
    front_end: str = AUTO,
    limits: TraceLimits | None = None,
) -> ModelGraph:
    """Finds the neuron groups of a module, and returns its graph IR.

    Args:
        model: Any ``nn.Module``; it is copied, put into evaluation mode and never run.
        example_inputs: A tensor or a tuple of positional inputs of the shapes that the model takes.
        manager: Whose node rules and front ends are used; the installed plugins by default.
        front_end: What captures the module: ``auto``, ``export`` or a registered one, such as ``make-fx``.
        limits: Time and size at which tracing is stopped.

    Raises:
        ArchitectureError: The module cannot be traced at these inputs, or was run before and holds what that run left.
        TraceLimitError: A limit is passed.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> list(trace_model(net, torch.randn(2, 4)).free_groups)
        ['0.weight:0']
    """
    # A fusion whose graph is kept from an earlier run traces nothing, and need not wait for this.
    from mergekit_ot.hooks.tracing import trace_with

    return trace_with(manager or default_manager(), model, example_inputs, front_end, limits)


def load_checkpoint(
    path: str | Path, manager: PluginManager | None = None, *, trust: bool = False, state_key: str | None = None
) -> Checkpoint:
    """Reads a checkpoint without executing anything that stands in it, unless the file is trusted.

    Plugins are asked first (hook ``mergeot_load_checkpoint``), then it is what ``torch.save`` or NumPy wrote.

    Args:
        path: The file, or the folder of a format that has several files.
        manager: Whose formats are known; the installed plugins by default.
        trust: Whether a program in the file (``.pt2``) may be loaded, which can run code of whoever made it.
        state_key: Which of several state dicts in the file is meant, such as ``params_ema``; the likeliest by default.

    Raises:
        CheckpointError: The file is missing, truncated, carries code, is quantised, or holds no tensor (there).

    Example:
        >>> import pathlib, tempfile, torch
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "net.pt"
        >>> torch.save({"epoch": 3, "model_state_dict": {"module.weight": torch.zeros(2, 3)}}, path)
        >>> checkpoint = load_checkpoint(path)
        >>> list(checkpoint.state), "model_state_dict" in checkpoint.found
        (['weight'], True)
    """
    return load(Path(path), readers(manager or default_manager(), is_trusted=trust), state_key)


def save_checkpoint(
    model_or_state: nn.Module | Mapping[str, Tensor],
    path: str | Path,
    *,
    architecture: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    input_shape: Sequence[int] | None = None,
    provenance: Mapping[str, Any] | None = None,
    template: Checkpoint | None = None,
    overwrite: bool = False,
    manager: PluginManager | None = None,
) -> Path:
    """Writes a checkpoint that carries its architecture by name, and returns its path; all of it, or nothing.

    Args:
        model_or_state: The module, or its state dict.
        path: Where to; plugins are asked first (hook ``mergeot_save_checkpoint``), then it is a PyTorch file.
        architecture: Name of a registered architecture, so that the file needs no ``--arch`` later.
        arguments: Its keyword arguments, plain data.
        input_shape: Shape of one input without the batch axis.
        provenance: Plain data on how the weights were made.
        template: The checkpoint to which the state belongs: gives the container and, read with trust, the program.
        overwrite: Whether a file that mergeot did not write may be replaced; its own files it replaces.
        manager: Whose formats are used; the installed plugins by default.

    Raises:
        CheckpointError: The file may not be written (`check_output`), or the metadata is not plain data.

    Example:
        >>> import tempfile, pathlib
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "net.pt"
        >>> saved = save_checkpoint(nn.Linear(3, 2), path, architecture="linear", input_shape=(3,))
        >>> load_checkpoint(saved).architecture
        'linear'
    """
    state = model_or_state.state_dict() if isinstance(model_or_state, nn.Module) else model_or_state
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "architecture": architecture,
        "arguments": dict(arguments or {}),
        "input_shape": None if input_shape is None else [int(size) for size in input_shape],
        "provenance": dict(provenance or {}),
    }
    manager = manager or default_manager()
    if template is not None and not isinstance(template, Checkpoint):
        raise CheckpointError(
            f"template is a {type(template).__name__}, and has to be the checkpoint that holds the program: "
            "load_checkpoint(path, trust=True)."
        )
    check_format(manager, Path(path), template)
    save(Path(path), state, metadata, writers(manager), template, overwrite=overwrite)
    return Path(path)


def fuse(
    models: Sequence[nn.Module | SourceModel],
    *,
    solver: str | AbstractBarycenterSolver = "wb",
    solver_options: Mapping[str, object] | None = None,
    example_inputs: Tensor | tuple[object, ...] | None = None,
    model_weights: Sequence[float] | None = None,
    target: int | nn.Module | SourceModel = 0,
    measure: str | None = None,
    data: Iterable[Any] | None = None,
    calibration_size: int = 2000,
    calibration_tokens: int | None = None,
    repair: str = "none",
    repair_options: Mapping[str, object] | None = None,
    fallback: bool = False,
    device: str = "auto",
    seed: int = 0,
    refine: bool = False,
    restarts: int = 1,
    widen: float = 1.0,
    executor: str | AbstractExecutor = "serial",
    threads: int | None = None,
    front_end: str = AUTO,
    limits: TraceLimits | None = None,
    keep: Sequence[str] = (),
    head: str = "one",
    layers: Sequence[Mapping[str, Any]] = (),
    manager: PluginManager | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> FusionResult:
    """Fuses independently trained networks into one; the fused state comes with its alignment and reports.

    Args:
        models: The sources: modules, or `SourceModel` where states are read from disk.
        solver: Name of a registered solver, or a solver.
        solver_options: Options of a solver given by name.
        example_inputs: Inputs to trace the models with; the first batch of `data` where it is not given.
        model_weights: One per source, non-negative; they are divided by their sum. Equal by default.
        target: Whose sizes the fused model takes: a source's number, or another module of the architecture.
        measure: What a neuron is seen by; the solver's own choice by default.
        data: Calibration batches, of inputs or (inputs, targets); targets are never read.
        calibration_size: Samples of `data` used at most; of a language model, a sample is a sequence.
        calibration_tokens: Tokens of `data` used at most, in whole sequences; None sets no limit of tokens.
        repair: Name of a registered repair, or ``none``.
        repair_options: Options of the repair.
        fallback: Whether one source alone is the result where it is nearer to the ensemble of all on held-out data.
        device: ``auto``, ``cpu`` or ``cuda``.
        seed: Seed of every random choice.
        refine: Whether to sweep on from the couplings found, every neuron seen by all its weights, until no gain.
        restarts: How often to align, each time with another seed; the least objective is kept.
        widen: Parameters of the fused model, as a multiple of the target's, from 1 to 2 (`resized` loads the result).
        executor: Name of a registered executor, or an executor.
        threads: Threads of torch; None gives each piece of work as many as it is worth, one to small networks.
        front_end: What captures the models: ``auto``, ``export`` or a registered one, such as ``make-fx``.
        limits: Time and size at which tracing is stopped.
        keep: Parameters that come from one source as they are: ``GLOB`` (of the target), or ``GLOB=SOURCE``.
        head: ``one``, or ``both`` where the fused model gets the heads of all sources, side by side.
        layers: Rules for single layers: mappings with ``parameters`` (a GLOB), and ``keep``, ``weights``, ``solver`` or
            ``measure``.
        manager: The plugins to use; the installed ones by default.
        progress: Called with (steps done, steps in all, what is done).
        dry_run: Plan only: the result holds no state.

    Raises:
        MergeotError: Anything is wrong with the models, the options or the data.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> result = fuse([model, model], solver="wb", example_inputs=torch.randn(2, 4))
        >>> bool(torch.allclose(result.state["0.weight"], model[0].weight))
        True
    """
    made: dict[str, Any] = {"solver": solver, "executor": executor}
    options = FusionOptions(
        solver=solver if isinstance(solver, str) else solver.name,
        solver_options=solver_options or {},  # type: ignore[arg-type]
        measure=measure,
        model_weights=model_weights,  # type: ignore[arg-type]
        calibration_size=calibration_size,
        calibration_tokens=calibration_tokens,
        repair=repair,
        repair_options=repair_options or {},  # type: ignore[arg-type]
        fallback=fallback,
        device=device,
        seed=seed,
        refine=refine,
        restarts=restarts,
        widen=float(widen),
        front_end=front_end,
        **_limits_of(limits or TraceLimits()),
        executor=executor if isinstance(executor, str) else type(executor).__name__,
        threads=threads,
        keep=keep,  # type: ignore[arg-type]
        head=head,
        layers=layers,  # type: ignore[arg-type]
    )
    inputs = FusionInputs(models, target, example_inputs, data)
    given = {kind: method for kind, method in made.items() if not isinstance(method, str)}
    return fuse_with(inputs, options, **given, manager=manager, progress=progress, dry_run=dry_run)


def _limits_of(limits: TraceLimits) -> dict[str, Any]:
    return {"trace_seconds": limits.seconds, "trace_operations": limits.operations}


def fuse_with(
    inputs: FusionInputs,
    options: FusionOptions,
    *,
    solver: AbstractBarycenterSolver | None = None,
    executor: AbstractExecutor | None = None,
    manager: PluginManager | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
    traces: KeptRecords | None = None,
) -> FusionResult:
    """Fuses networks as one record of options says: what `fuse` does, for callers that hold the options as data.

    Args:
        inputs: What is fused.
        options: How.
        solver: A solver to take instead of the one that `options` names.
        executor: An executor to take instead of the one that `options` names.
        manager: The plugins to use; the installed ones by default.
        progress: Called with (steps done, steps in all, what is done).
        dry_run: Plan only: the result holds no state.
        traces: Where the traces of earlier runs are kept, as the commands keep them; nowhere by default.

    Raises:
        MergeotError: Anything is wrong with the models, the options or the data.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> fuse_with(FusionInputs([model, model], example_inputs=torch.randn(2, 4)), FusionOptions()).solver
        'wb'
    """
    methods = GivenMethods(solver, executor)
    with threads_for(0, options.threads):
        setup = prepare(inputs, options, manager or default_manager(), trace_model, methods, traces)
    with threads_for(setup.multiplications, options.threads):
        return run_fusion(setup, progress, dry_run)
