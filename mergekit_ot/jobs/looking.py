"""Look at checkpoints without changing them: check, inspect, evaluate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from mergekit_ot.api import check_model, trace_model
from mergekit_ot.graph.capture.capture import AUTO
from mergekit_ot.graph.capture.front_end import TraceLimits
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.symmetry.check import CheckReport
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.pictures.dot import group_dot
from mergekit_ot.pictures.groups import group_svg
from mergekit_ot.pictures.modules import module_svg
from mergekit_ot.progress import Notify
from mergekit_ot.scoring.evaluation import Evaluation, evaluate
from mergekit_ot.sources.datasets import resolve_data
from mergekit_ot.sources.example_inputs import example_inputs_of
from mergekit_ot.sources.reading import ReadSource, read_sources
from mergekit_ot.storage.files import check_writable, write_text


@dataclass(frozen=True)
class Tracing:
    """How a checkpoint's architecture is traced."""

    front_end: str
    limits: TraceLimits


def make_tracing(front_end: str | None, seconds: float | None) -> Tracing:
    """Returns the front end and the limits that were asked for, or the defaults."""
    limits = TraceLimits()
    return Tracing(front_end or AUTO, limits if seconds is None else replace(limits, seconds=seconds))


def run_check(
    path: str, arch: Sequence[str], input_shape: tuple[int, ...] | None, data: str | None, seed: int, tracing: Tracing,
    manager: PluginManager, notify: Notify,
) -> CheckReport:  # fmt: skip
    """Reorders every neuron group at random and looks whether the function stays."""
    source, inputs = _one_source(path, arch, input_shape, data, manager, notify)
    return check_model(
        source.make, inputs, manager=manager, seed=seed, front_end=tracing.front_end, limits=tracing.limits
    )


def run_inspect(
    path: str, arch: Sequence[str], input_shape: tuple[int, ...] | None, data: str | None, tracing: Tracing,
    manager: PluginManager, notify: Notify, pictures: Mapping[str, Path | None],
) -> ModelGraph:  # fmt: skip
    """Traces a checkpoint's architecture and draws what is asked for.

    Args:
        pictures: Kind of picture (``dot``, ``svg``: the neuron groups; ``modules``: the modules) → file.
    """
    for picture in pictures.values():
        if picture is not None:
            check_writable(picture)
    source, inputs = _one_source(path, arch, input_shape, data, manager, notify)
    graph = trace_model(source.make(), inputs, manager, front_end=tracing.front_end, limits=tracing.limits)
    drawn = {"dot": group_dot, "svg": group_svg, "modules": module_svg}
    for kind, draw in drawn.items():
        picture = pictures.get(kind)
        if picture is not None:
            write_text(picture, draw(graph))
    return graph


def _one_source(
    path: str, arch: Sequence[str], input_shape: tuple[int, ...] | None, data: str | None, manager: PluginManager,
    notify: Notify,
) -> tuple[ReadSource, tuple[Tensor, ...]]:  # fmt: skip
    source = read_sources([path], arch, manager, notify)[0]
    # Nothing that follows reads the weights, and whoever looks at a checkpoint wants to know that they are damaged.
    source.state.check_all()
    batches = None if data is None else resolve_data(data, manager)
    return source, example_inputs_of(source, input_shape, batches, notify)[0]


def run_eval(
    paths: Sequence[str], arch: Sequence[str], data: str, device: str, manager: PluginManager, notify: Notify
) -> tuple[Evaluation, ...]:
    """Scores checkpoints on the test part of data, in one pass."""
    source = resolve_data(data, manager)
    models = [read.module() for read in read_sources(paths, arch, manager, notify)]
    return evaluate(models, source, device)
