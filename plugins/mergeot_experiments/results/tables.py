"""Measured cells as tables: mean and standard deviation over the sets of sources, for each method and column."""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mergekit_ot import MergeotError, PluginManager
from mergeot_experiments.catalogue.descriptions import FULL, Design, Experiment, Method, Setting
from mergeot_experiments.running.store import Cell, Store, code_version, content_of, newest, sources_of

_MEAN, _ENSEMBLE = "sources, mean", "ensemble"


@dataclass(frozen=True)
class Summary:
    """Accuracies over the sets of sources.

    Attributes:
        mean: Their mean.
        deviation: Their sample standard deviation; None for a single one.
        values: All of them, in the order of the sets.
    """

    mean: float
    deviation: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        """Returns the summary of at least one value.

        Example:
            >>> Summary.of([1.0, 2.0, 3.0])
            Summary(mean=2.0, deviation=1.0, values=(1.0, 2.0, 3.0))
        """
        return cls(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, tuple(values))

    def text(self, expected: int) -> str:
        """Returns mean ± standard deviation, and the number of values where it is not the expected one."""
        deviation = "" if self.deviation is None else f" ± {self.deviation:.2f}"
        return f"{self.mean:.2f}{deviation}" + ("" if len(self.values) == expected else f" ({len(self.values)})")


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        block: Which sources it is about; empty where all lines are about the same.
        name: The method, or what is measured on the sources.
        method: None for what is measured on the sources.
        command: What made it.
        summaries: Column → accuracies.
        seconds: Mean time of a fusion.
        is_current: Whether the code that measured it is the installed one.
    """

    block: str
    name: str
    method: Method | None
    command: str
    summaries: Mapping[str, Summary]
    seconds: float | None
    is_current: bool


@dataclass(frozen=True)
class ResultTable:
    """What was measured of one experiment at one scale.

    Attributes:
        experiment: The experiment.
        scale: The scale.
        repetitions: Sets of sources, where all were run.
        sources: How the sources are trained.
        columns: In order.
        rows: In order.
        cells: What it is made of.
    """

    experiment: Experiment
    scale: str
    repetitions: int
    sources: tuple[str, ...]
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    cells: tuple[Cell, ...]

    def as_json(self) -> dict[str, Any]:
        """Returns the object of ``--json``."""
        return {
            "name": self.experiment.name, "title": self.experiment.title, "scale": self.scale,
            "sets": self.repetitions, "sources": list(self.sources), "rows": [_row_as_json(row) for row in self.rows],
        }  # fmt: skip


def _row_as_json(row: Row) -> dict[str, Any]:
    method = {"solver": None} if row.method is None else asdict(row.method)
    return {
        "block": row.block, "name": row.name, **method, "command": row.command, "seconds": row.seconds,
        "is_current": row.is_current,
        "accuracy": {
            column: {"mean": one.mean, "sd": one.deviation, "count": len(one.values), "values": list(one.values)}
            for column, one in row.summaries.items()
        },
    }  # fmt: skip


@dataclass(frozen=True)
class Selection:
    """Which of the stored cells a table shows; all of them by default."""

    methods: tuple[Method, ...] | None = None
    repetitions: int | None = None


def make_table(
    experiment: Experiment, scale: str, store: Store, manager: PluginManager, selection: Selection | None = None
) -> ResultTable | None:
    """Returns the table of what is stored; None where nothing is."""
    design, chosen = experiment.designs[scale](), selection or Selection()
    sets = range(chosen.repetitions or design.repetitions)
    rows: list[Row] = []
    cells: list[Cell] = []
    for block in dict.fromkeys(setting.row for setting in design.settings):
        settings = [setting for setting in design.settings if setting.row == block]
        maker = _Rows(experiment.name, scale, design, settings, sets, store, manager)
        of_methods = [maker.of_method(method) for method in maker.methods(chosen.methods)]
        found = [pair for pair in [*maker.of_sources(), *of_methods] if pair[0].summaries]
        rows += [row for row, _ in found]
        cells += [cell for _, measured in found for cell in measured]
    if not rows:
        return None
    trainings = [training for setting in design.settings for one_set in setting.sources for training in one_set]
    sources = tuple(dict.fromkeys(training.description for training in trainings))
    columns = tuple(dict.fromkeys(setting.column for setting in design.settings))
    return ResultTable(experiment, scale, len(sets), sources, columns, tuple(rows), tuple(cells))


@dataclass(frozen=True)
class _Rows:
    """Makes the rows of one block, each with the cells it was made of."""

    experiment: str
    scale: str
    design: Design
    settings: Sequence[Setting]
    sets: range
    store: Store
    manager: PluginManager

    def methods(self, chosen: Sequence[Method] | None) -> list[Method]:
        """Returns the methods that are shown: those of the design, then the others by name."""
        if chosen is not None:
            return list(chosen)
        own = self.design.all_methods
        # Experiments share cells: what another one measured in a column or two is no row of this one.
        shared = set.intersection(
            *({cell.method.name for cell in self._cells(setting) if cell.method} for setting in self.settings)
        )
        stored = [cell.method for setting in self.settings for cell in self._cells(setting) if cell.method]
        others = {method.name: method for method in stored if method not in own and method.name in shared}
        return [*own, *(others[name] for name in sorted(others))]

    def of_sources(self) -> Iterable[tuple[Row, list[Cell]]]:
        """Yields the rows of the sources, one for each role, and of their ensemble."""
        cells = {setting.column: self._of_sources(setting) for setting in self.settings}
        used = [cell for found in cells.values() for cell in found]
        names = [f"source {role}" for role in self.settings[0].roles] or [_MEAN]
        if any(len(setting.sources[0]) > 1 for setting in self.settings):
            names.append(_ENSEMBLE)
        for name in names:
            summaries = {
                setting.column: Summary.of([_of_sources(cell, name, setting) for cell in cells[setting.column]])
                for setting in self.settings
                if cells[setting.column]
            }
            yield Row(self.settings[0].row, name, None, self._command(None), summaries, None, True), used

    def of_method(self, method: Method) -> tuple[Row, list[Cell]]:
        """Returns the row of a method: of the installed code where it was measured, else of the newest that was."""
        cells = {
            setting.column: [cell for cell in self._cells(setting) if cell.method == method]
            for setting in self.settings
        }
        everything = [cell for found in cells.values() for cell in found]
        current = code_version(method, self.manager) if method.solver in self.manager.solvers else ""
        latest = newest(cell for cell in everything if cell.version == current) or newest(everything)
        version = latest.version if latest is not None else current
        used = [cell for cell in everything if cell.version == version]
        summaries = {
            column: Summary.of([_number(cell, "accuracy") for cell in found if cell.version == version])
            for column, found in cells.items()
            if any(cell.version == version for cell in found)
        }
        seconds = statistics.fmean(_number(cell, "seconds") for cell in used) if used else None
        row = Row(
            self.settings[0].row, method.name, method, self._command(method), summaries, seconds, version == current
        )
        return row, used

    def _cells(self, setting: Setting) -> list[Cell]:
        return [cell for number in self.sets for cell in self.store.of_content(content_of(setting, number))]

    def _of_sources(self, setting: Setting) -> list[Cell]:
        return [cell for number in self.sets for cell in self.store.of_content(sources_of(setting, number))]

    def _command(self, method: Method | None) -> str:
        words = ["mergeot", "experiments", "run", self.experiment]
        if self.scale == FULL:
            words.append("--full")
        if method is not None:
            words += method.flags
        if len(self.sets) != self.design.repetitions:
            words += ["--seeds", str(len(self.sets))]
        return shlex.join(words)


def _of_sources(cell: Cell, name: str, setting: Setting) -> float:
    each: Any = cell.result["each"]
    if name == _ENSEMBLE:
        return _number(cell, "ensemble")
    if name == _MEAN:
        return statistics.fmean(each)
    # The roles of a setting say in which order its sources stand.
    return float(each[setting.roles.index(name.removeprefix("source "))])


def _number(cell: Cell, name: str) -> float:
    value = cell.result[name]
    if not isinstance(value, int | float):
        raise MergeotError(f"A stored measurement has no number '{name}'. Measure it anew: --again.")
    return float(value)
