"""Runs an experiment: trains what is missing, fuses and scores what was not measured yet, keeps every cell."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from mergekit_ot import DataError, PluginManager, RecipeError, SolverError, evaluate, fuse, resolve_architecture
from mergeot_experiments.catalogue.descriptions import ACCURACY, Design, Experiment, Method, Setting
from mergeot_experiments.running.progress import Estimate, ProgressLine
from mergeot_experiments.running.store import SOURCES_VERSION, Store, code_version, content_of, sources_of
from mergeot_experiments.sources.sequences import Samples, data_set, rows_of
from mergeot_experiments.sources.training import Training, trained


@dataclass(frozen=True)
class Order:
    """What is to be measured.

    Attributes:
        experiment: The experiment.
        scale: One of its scales.
        methods: Instead of the design's own, where given.
        repetitions: Sets of sources; all that the design has, where None.
        is_again: Measure also what is stored already.
    """

    experiment: Experiment
    scale: str
    methods: tuple[Method, ...] = ()
    repetitions: int | None = None
    is_again: bool = False

    @functools.cached_property
    def design(self) -> Design:
        """The design at the chosen scale."""
        return self.experiment.designs[self.scale]()

    @property
    def all_methods(self) -> tuple[Method, ...]:
        """The methods to run, in some setting at least."""
        return self.methods or self.design.all_methods

    @property
    def sets(self) -> int:
        """The number of sets of sources.

        Raises:
            RecipeError: The experiment does not have as many as are asked for.
        """
        available = self.design.repetitions
        if self.repetitions is not None and self.repetitions > available:
            raise RecipeError(
                f"Experiment '{self.experiment.name}' has {available} sets of sources at the {self.scale} scale, and "
                f"{self.repetitions} were asked for. Give --seeds {available} or fewer."
            )
        return self.repetitions or available


@dataclass(frozen=True)
class _Task:
    setting: Setting
    number: int
    method: Method | None
    version: str

    @property
    def sources(self) -> tuple[Training, ...]:
        return self.setting.sources[self.number]

    @property
    def content(self) -> dict[str, object]:
        return (content_of if self.method is not None else sources_of)(self.setting, self.number)

    @property
    def combination(self) -> str:
        return f"{self.setting.row} {self.setting.column}, {self.method.name if self.method else ''}".strip()

    @property
    def name(self) -> str:
        seeds = " + ".join(str(training.seed) for training in self.sources)
        words = (
            self.setting.row,
            self.setting.column,
            self.method.name if self.method else "sources",
            f"seeds {seeds}",
        )
        return " · ".join(part for part in words if part)


def run(order: Order, store: Store, manager: PluginManager, line: ProgressLine) -> tuple[str, ...]:
    """Measures what is missing.

    Returns:
        A sentence for each setting and method that cannot be combined.

    Raises:
        MergeotError: The data, a solver or an option is missing or wrong.
    """
    tasks = [task for task in _tasks(order, manager) if order.is_again or not _is_stored(task, store)]
    if not tasks:
        return ()
    networks = _Networks(line)
    networks.train(list(itertools.chain.from_iterable(task.sources for task in tasks)))
    estimate, refused = Estimate(len(tasks)), {}
    for task in tasks:
        try:
            result = _measure(task, networks, manager)
        except _RefusedError as error:
            refused.setdefault(task.combination, f"{task.combination}: {error}")
            line.stay(f"{estimate.step()} {task.name}: not possible")
            continue
        store.put(task.content, task.method, task.version, result)
        line.stay(f"{estimate.step()} {task.name}: {_shown(result, order.experiment.metric)}")
    line.clear()
    return tuple(refused.values())


def _tasks(order: Order, manager: PluginManager) -> list[_Task]:
    versions = {method.name: code_version(method, manager) for method in order.all_methods}
    tasks, known = [], set()
    for setting in order.design.settings:
        for number in range(order.sets):
            # Settings that differ in the fused model's sizes alone share what is measured on the sources.
            sources = str(sources_of(setting, number))
            if sources not in known:
                known.add(sources)
                tasks.append(_Task(setting, number, None, SOURCES_VERSION))
            methods = order.methods or order.design.methods_of(setting)
            tasks += [_Task(setting, number, method, versions[method.name]) for method in methods]
    return tasks


def _is_stored(task: _Task, store: Store) -> bool:
    return store.find(task.content, task.method, task.version) is not None


class _RefusedError(Exception):
    """A solver cannot fuse these sources, or a repair does not trust itself with them; others can."""


class _Networks:
    """Trained networks and the data they belong to, each loaded once."""

    def __init__(self, line: ProgressLine) -> None:
        self._line = line
        self._models: dict[str, nn.Module] = {}

    def train(self, trainings: Sequence[Training]) -> None:
        """Trains those that are not in the cache."""
        wanted = {training.key: training for training in trainings if not training.path.is_file()}
        estimate = Estimate(len(wanted))
        for training in wanted.values():
            self.model(training)
            self._line.stay(f"{estimate.step()} trained {training.description}, seed {training.seed}")

    def model(self, training: Training) -> nn.Module:
        """Returns the network of a training."""
        if training.key not in self._models:
            self._models[training.key] = trained(training, data_set(training.data).training_images, self._line.pass_by)
        return self._models[training.key]

    @functools.cache  # noqa: B019 - lives as long as a run
    def test(self, data: str) -> Sequence[Samples]:
        """Returns the test images that belong to training data."""
        return data_set(data).test_batches()

    @functools.cache  # noqa: B019 - lives as long as a run
    def calibration(self, data: str) -> Sequence[Samples]:
        """Returns the calibration images that belong to training data."""
        return data_set(data).calibration_batches()


class _Ensemble(nn.Module):
    """The weighted mean of the networks' probabilities, as log-probabilities."""

    def __init__(self, models: Sequence[nn.Module], weights: Sequence[float]) -> None:
        super().__init__()
        self.models, self.weights = nn.ModuleList(models), tuple(weights)

    def forward(self, *inputs: Shaped[Tensor, "batch ..."]) -> Float[Tensor, "batch ... output"]:
        probabilities = [w * model(*inputs).softmax(-1) for w, model in zip(self.weights, self.models, strict=True)]
        return torch.stack(probabilities).sum(0).log()


def _measure(task: _Task, networks: _Networks, manager: PluginManager) -> dict[str, object]:
    setting = task.setting
    trainings = task.sources
    models = [networks.model(training) for training in trainings]
    test = networks.test(trainings[0].data)
    if task.method is None:
        weights = setting.model_weights or [1 / len(models)] * len(models)
        *each, ensemble = evaluate([*models, _Ensemble(models, weights)], test)
        return {
            "each": [score.accuracy for score in each],
            "ensemble": ensemble.accuracy,
            "each_loss": [score.loss for score in each],
            "ensemble_loss": ensemble.loss,
        }
    target, method = setting.target, task.method
    goal = 0 if target is None else resolve_architecture(target.architecture, manager, target.arguments)()
    calibration = networks.calibration(trainings[0].data)
    try:
        fused = fuse(
            models,
            solver=method.solver,
            solver_options=method.options,
            refine=method.refine,
            restarts=method.restarts,
            measure=method.measure,
            example_inputs=rows_of(test[0][0], slice(2)),
            model_weights=setting.model_weights,
            target=goal,
            data=calibration,
            repair=method.repair or setting.repair,
            device="cpu",
            seed=task.number,
            manager=manager,
        )
    except (SolverError, DataError) as error:
        raise _RefusedError(str(error)) from error
    score = evaluate(fused.model(), test)
    return {
        "accuracy": score.accuracy,
        "loss": score.loss,
        "seconds": fused.seconds,
        "aligned_sources_max_error": fused.aligned_sources_max_error,
        "groups": len(fused.groups),
    }


def _shown(result: dict[str, Any], metric: str) -> str:
    suffix = "" if metric == ACCURACY else "_loss"
    unit = " %" if metric == ACCURACY else ""
    if "each" in result:
        each = ", ".join(f"{value:.2f}" for value in result[f"each{suffix}"])
        return f"{each}; ensemble {result[f'ensemble{suffix}']:.2f}{unit}"
    return f"{result[metric]:.2f}{unit} ({result['seconds']:.1f} s)"
