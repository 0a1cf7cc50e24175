"""Measured cells, one JSON file each in the cache folder, so that a run that was stopped goes on where it was.

A cell is found by everything that decides it: the sources, the sizes and model weights, the method, and the version
of the code. Names of experiments and columns are not among them: they may change, and two experiments may share cells.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import itertools
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

import mergekit_ot
from mergekit_ot import MergeotError, PluginManager, write_text
from mergeot_experiments.catalogue.descriptions import Method, Setting

# Of what is measured on the sources alone; raised whenever that is measured in another way.
SOURCES_VERSION = "sources 1"
_CORE_PARTS = ("transport", "fusion")
_REFINEMENT = "refinement"


@dataclass(frozen=True)
class Cell:
    """One measurement.

    Attributes:
        content: What was fused, see `content_of`.
        method: The solver; None for the sources themselves and their ensemble.
        version: Of the code that measured it.
        result: Numbers by name: ``accuracy`` and so on, or ``each`` and ``ensemble`` for the sources.
        measured: When, and with which packages.
    """

    content: Mapping[str, object]
    method: Method | None
    version: str
    result: Mapping[str, object]
    measured: Mapping[str, str]


def content_of(setting: Setting, number: int) -> dict[str, object]:
    """Returns what decides the fusion of one set of sources, besides the method."""
    return {
        "sources": [training.key for training in setting.sources[number]],
        "model_weights": setting.model_weights,
        "target": None if setting.target is None else asdict(setting.target),
        "repair": setting.repair,
        "seed": number,
    }


def sources_of(setting: Setting, number: int) -> dict[str, object]:
    """Returns what decides the scores of the sources and their ensemble."""
    content = content_of(setting, number)
    return {"sources": content["sources"], "model_weights": content["model_weights"]}


class Store:
    """The measured cells of one cache folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cells: dict[str, dict[str, Cell]] = defaultdict(dict)
        for path in sorted(folder.glob("*.json")):
            cell = _read(path)
            if cell is not None:
                self._remember(cell)

    def find(self, content: Mapping[str, object], method: Method | None, version: str) -> Cell | None:
        """Returns the cell that was measured of this content by this method and version, if there is one."""
        return self._cells[_digest(content)].get(_digest(_identity(content, method, version)))

    def of_content(self, content: Mapping[str, object]) -> list[Cell]:
        """Returns the cells of all methods and versions."""
        return list(self._cells[_digest(content)].values())

    def put(
        self, content: Mapping[str, object], method: Method | None, version: str, result: Mapping[str, object]
    ) -> Cell:
        """Keeps a measurement, in place of an older one of the same."""
        measured = {
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "mergekit_ot": mergekit_ot.__version__,
            "torch": str(torch.__version__),
        }
        identity = _identity(content, method, version)
        path = self._folder / f"{_digest(identity)}.json"
        text = json.dumps({**identity, "result": result, "measured": measured}, indent=1)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # All that stands in the cache is ours.
            write_text(path, text, overwrite=True)
        except OSError as error:
            raise MergeotError(
                f"Cannot write to '{self._folder}': {error.strerror}. Name another folder with MERGEOT_CACHE."
            ) from error
        cell = Cell(content, method, version, result, measured)
        self._remember(cell)
        return cell

    def _remember(self, cell: Cell) -> None:
        identity = _identity(cell.content, cell.method, cell.version)
        self._cells[_digest(cell.content)][_digest(identity)] = cell


def code_version(method: Method, manager: PluginManager) -> str:
    """Returns a hash of the code that decides a fusion by this method.

    It covers the packages of the solver, its measure, refinement and repair, and transport and fusion of the core;
    comments, docstrings and layout do not count.
    """
    solver = manager.get("solver", method.solver)
    used = [solver, manager.get("measure", method.measure or solver.measure)]
    used += [manager.get("solver", _REFINEMENT)] if method.refine else []
    used += [manager.get("repair", method.repair)] if method.repair not in (None, "none") else []
    packages = {kind.__module__.partition(".")[0] for kind in used}
    core = Path(mergekit_ot.__path__[0])
    folders = [*map(_files_of, packages), *(_files(core / name) for name in _CORE_PARTS)]
    return _hash_of(tuple(sorted(itertools.chain.from_iterable(folders))))


def _files_of(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return []
    origin = Path(spec.origin)
    return _files(origin.parent) if spec.submodule_search_locations is not None else [origin]


def _files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


# Once for each process: a file that is edited during a run is not the code that runs.
@functools.cache
def _hash_of(files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for file in files:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
        digest.update(f"{file.parent.name}/{file.name}\n{ast.dump(tree)}\n".encode())
    return digest.hexdigest()[:12]


def _identity(content: Mapping[str, object], method: Method | None, version: str) -> dict[str, object]:
    return {
        "content": content,
        "method": None if method is None else _described(method),
        "version": version,
    }


def _described(method: Method) -> dict[str, object]:
    """Returns a method as data; without a repair of its own it is what it was before methods had one."""
    return {name: value for name, value in asdict(method).items() if name != "repair" or value is not None}


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:20]


def _read(path: Path) -> Cell | None:
    """Returns the cell in a file; None where the file is no cell, which is then measured again."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        method = None if stored["method"] is None else Method(**stored["method"])
        return Cell(stored["content"], method, stored["version"], stored["result"], stored["measured"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def newest(cells: Iterable[Cell]) -> Cell | None:
    """Returns the cell that was measured last."""
    return max(cells, key=lambda cell: cell.measured["at"], default=None)
