"""Look at checkpoints without changing them: check, inspect, evaluate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mergekit_ot.api import check_model, trace_model
from mergekit_ot.fusion.normalising import told_of_ties
from mergekit_ot.fusion.options import FusionOptions
from mergekit_ot.fusion.setup import trace_limits
from mergekit_ot.graph.capture.front_end import AUTO
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.symmetry.check import CheckReport
from mergekit_ot.graph.symmetry.held import held_symmetries
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.hooks.symmetries import build_symmetries
from mergekit_ot.pictures.dot import group_dot
from mergekit_ot.pictures.groups import group_svg
from mergekit_ot.pictures.modules import module_svg
from mergekit_ot.progress import Notify, Progress
from mergekit_ot.scoring.data_options import DataOptions
from mergekit_ot.scoring.devices import choose_device
from mergekit_ot.scoring.evaluation import Evaluation, evaluate
from mergekit_ot.scoring.metrics import top
from mergekit_ot.sources.datasets import resolve_data
from mergekit_ot.sources.example_inputs import example_inputs_of
from mergekit_ot.sources.guesses import check_function_is_known
from mergekit_ot.sources.metrics import resolve_metric
from mergekit_ot.sources.needs import needs_of
from mergekit_ot.sources.reading import ReadSource, read_sources
from mergekit_ot.sources.spec_files import spec_files
from mergekit_ot.storage.file_options import FileOptions
from mergekit_ot.storage.files import write_text
from mergekit_ot.storage.marks import DOT_COMMENT, XML_COMMENT
from mergekit_ot.storage.outputs import check_outputs


@dataclass(frozen=True)
class Subject(FileOptions, DataOptions):
    """The checkpoint that is looked at, and how its architecture is traced.

    Attributes:
        path: The checkpoint.
        arch: Its architecture SPEC, or none where the file carries one.
        input_shape: Shape of one input without the batch axis.
        data: Data SPEC, whose first batch gives the inputs.
        front_end: What captures the module; None for the default.
        trace_seconds: Seconds after which tracing is stopped; None for the default.
        trace_operations: Calls into torch after which it is stopped; None for the default.
        trust: The checkpoint's own name, where its program may be loaded.
    """

    path: str
    arch: tuple[str, ...] = ()
    input_shape: tuple[int, ...] | None = None
    data: str | None = None
    front_end: str | None = None
    trace_seconds: float | None = None
    trace_operations: int | None = None
    trust: tuple[str, ...] = ()

    @property
    def tracing(self) -> dict[str, Any]:
        """The keywords of `trace_model` and `check_model` that say how."""
        limits = {"trace_seconds": self.trace_seconds, "trace_operations": self.trace_operations}
        options = FusionOptions(front_end=self.front_end or AUTO, **limits)
        return {"front_end": options.front_end, "limits": trace_limits(options)}

    @property
    def files(self) -> list[str | Path]:
        """What is read of it."""
        specs = [*self.arch, *([] if self.data is None else [self.data])]
        return [self.path, *itertools.chain.from_iterable(map(spec_files, specs))]

    def read(self, manager: PluginManager, notify: Notify) -> tuple[ReadSource, tuple[Tensor, ...]]:
        """Returns the source that was read, and inputs to trace it by."""
        source = read_sources([self.path], self.arch, manager, notify, self.trust, self)[0]
        # Nothing that follows reads the weights, and whoever looks at a checkpoint wants to know that they are damaged.
        source.state.check_all()
        data = None if self.data is None else resolve_data(self.data, manager)
        batches = None if data is None else data.for_network(*needs_of([source], self, notify))
        return source, example_inputs_of(source, self.input_shape, batches, notify, self.inputs)[0]


def run_check(subject: Subject, seed: int, manager: PluginManager, notify: Notify) -> CheckReport:
    """Reorders every neuron group at random and looks whether the function stays."""
    source, inputs = subject.read(manager, notify)
    report = check_model(source.make, inputs, manager=manager, seed=seed, **subject.tracing)

    def trace(module: nn.Module) -> ModelGraph:
        return trace_model(module, inputs, manager, **subject.tracing)

    untied = told_of_ties(source.make, report.graph, inputs, trace, build_symmetries(manager))
    return replace(report, untied=untied)


def run_inspect(
    subject: Subject,
    pictures: Mapping[str, Path | None],
    manager: PluginManager,
    notify: Notify,
    *,
    overwrite: bool = False,
) -> tuple[ModelGraph, dict[str, list[str]]]:
    """Traces a checkpoint's architecture, draws what is asked for, and returns the graph and what else groups allow.

    Args:
        subject: The checkpoint, and how it is traced.
        pictures: Kind of picture (``dot``, ``svg``: the neuron groups; ``modules``: the modules) → file.
        manager: Whose node rules are used.
        notify: Told what was found.
        overwrite: Whether pictures may replace files that mergeot did not write.
    """
    check_outputs({f"--{kind}": path for kind, path in pictures.items()}, subject.files, overwrite=overwrite)
    source, inputs = subject.read(manager, notify)
    graph = trace_model(source.make(), inputs, manager, **subject.tracing)
    drawn = {"dot": (group_dot, DOT_COMMENT), "svg": (group_svg, XML_COMMENT), "modules": (module_svg, XML_COMMENT)}
    for kind, (draw, comment) in drawn.items():
        picture = pictures.get(kind)
        if picture is not None:
            write_text(picture, draw(graph), comment=comment, overwrite=overwrite)
    return graph, held_symmetries(source.make, graph, inputs, build_symmetries(manager))


@dataclass(frozen=True, kw_only=True)
class Scoring(DataOptions):
    """What is measured, and which entries of a batch are meant.

    Attributes:
        metrics: SPECs of metrics besides loss and accuracy.
        top: A target counts as met where it is among so many likeliest classes; None leaves that out.
        input_shape: Shape of one input, where data are read for it.
    """

    metrics: tuple[str, ...] = ()
    top: int | None = None
    input_shape: tuple[int, ...] | None = None


def run_eval(
    paths: Sequence[str],
    arch: Sequence[str],
    data: str,
    device: str,
    manager: PluginManager,
    notify: Notify,
    trust: Sequence[str] = (),
    files: FileOptions | None = None,
    scoring: Scoring | None = None,
    progress: Progress | None = None,
) -> tuple[Evaluation, ...]:
    """Scores checkpoints on the test part of data, in one pass."""
    asked = scoring or Scoring()
    choose_device(device)
    metrics = [*([] if asked.top is None else [top(asked.top)]), *map(resolve_metric, asked.metrics)]
    source = resolve_data(data, manager)
    sources = read_sources(paths, arch, manager, notify, trust, files or FileOptions())
    check_function_is_known([(read.name, read.make) for read in sources], "'mergeot eval'")
    models = [read.module() for read in sources]
    needs, options = needs_of(sources, asked, notify)
    scores = evaluate(models, source.for_network(needs, options), device, metrics=metrics, progress=progress)
    for path, score in zip(paths, scores, strict=True):
        if not math.isfinite(score.loss):
            notify(
                f"warning: the loss of '{path}' is {score.loss}: its outputs are not finite on some inputs, though all "
                "inputs are. Look at its weights: 'mergeot check' names those that are not finite."
            )
    return scores
