"""All that a report says about a fusion, before it is put into words."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mergekit_ot.fusion.result import FusionResult
from mergekit_ot.recipe import FusionRecipe
from mergekit_ot.report.group_facts import GroupFacts, describe_groups
from mergekit_ot.report.repeating import fuse_command, recipe_command
from mergekit_ot.report.scores import Scores
from mergekit_ot.scoring.devices import choose_device
from mergekit_ot.scoring.evaluation import Evaluation
from mergekit_ot.sources.portable import portable_path, portable_spec, portable_text, portable_value
from mergekit_ot.sources.reading import ReadSource
from mergekit_ot.sources.specs import Architecture
from mergekit_ot.storage.files import file_digest, folder_digest, size_of

if TYPE_CHECKING:
    from mergekit_ot.report.outcome import FusionOutcome


@dataclass(frozen=True)
class FileFacts:
    """A checkpoint of a fusion.

    Attributes:
        name: The file, as the user gave it; without its folder where that was an absolute path.
        sha256: Its digest.
        size: In bytes.
        parameters: Number of its trainable numbers.
        architecture: As a SPEC.
        weight: Its model weight; None for the fused model.
    """

    name: str
    sha256: str
    size: int
    parameters: int
    architecture: str
    weight: float | None

    @property
    def short(self) -> str:
        """The file name without its folder."""
        return Path(self.name).name


@dataclass(frozen=True)
class Report:
    """A fusion, with everything that its report shows.

    Attributes:
        recipe: What was asked for.
        result: What came out.
        sources: The files that were fused, in order.
        fused: The file that was written.
        scores: What was measured on data.
        groups: One record per neuron group.
        command: The command line that repeats the fusion; None where only the recipe can say it.
        recipe_command: The command that repeats it from the recipe in the report's folder.
        device: The device that it ran on.
        versions: What it ran with, by name.
        made_at: When the report was made.
    """

    recipe: FusionRecipe
    result: FusionResult
    sources: tuple[FileFacts, ...]
    fused: FileFacts
    scores: Scores
    groups: tuple[GroupFacts, ...]
    command: str | None
    recipe_command: str
    device: str
    versions: dict[str, str]
    made_at: str

    @property
    def is_exact(self) -> bool:
        """Whether every source was only reordered."""
        return all(self.result.alignment.is_function_preserving(number) for number in range(len(self.sources)))

    @property
    def symmetries(self) -> dict[str, list[str]]:
        """The groups that have each symmetry that the fusion asked for, besides the order of neurons, by its name."""
        return {name: self._groups_with(name) for name in self.result.alignment.symmetries}

    def _groups_with(self, symmetry: str) -> list[str]:
        return [group.report.name for group in self.groups if symmetry in group.symmetries]

    def as_json(self) -> dict[str, Any]:
        """Returns what ``report.json`` holds beyond the object of ``mergeot fuse --json``."""
        own = list(zip([file.name for file in self.sources], self.scores.sources, strict=False))
        return {
            "warnings": list(self.result.warnings),
            "notes": list(self.result.notes),
            "symmetries": self.symmetries,
            "sources": [vars(file) for file in self.sources],
            "fused": {key: value for key, value in vars(self.fused).items() if key != "weight"},
            "scores": [{"name": name, **score.as_json()} for name, score in [*own, *self.scores.rows]],
            "path": dict(self.scores.curves),
            "not_measured": self.not_measured,
            "command": self.command,
            "recipe_command": self.recipe_command,
            "device": self.device,
            "versions": self.versions,
        }

    @property
    def not_measured(self) -> list[str]:
        """Why scores are missing, a sentence each."""
        scores = self.scores
        return [why for why in (scores.missing, scores.naive_missing, scores.path_missing) if why]


def collect_report(
    folder: Path,
    recipe: FusionRecipe,
    outcome: FusionOutcome,
    sources: Sequence[ReadSource],
    fused_as: Architecture,
    scores: Scores,
) -> Report:
    """Returns what a report says about a fusion that was saved.

    Args:
        folder: Where the report goes.
        recipe: What was asked for.
        outcome: What came out.
        sources: The checkpoints, in order.
        fused_as: Architecture of the fused model.
        scores: What was measured.
    """
    output = Path(outcome.output or recipe.output)
    device = choose_device(recipe.device).type
    shared, result = portable_recipe(recipe), outcome.result
    warnings, notes = (tuple(map(portable_text, texts)) for texts in (result.warnings, result.notes))
    files = [
        FileFacts(
            portable_path(source.name),
            source.checkpoint.sha256,
            size_of(source.checkpoint.path),
            _count(source.known.outline),
            _spec(source.make),
            weight,
        )
        for source, weight in zip(sources, recipe.weights, strict=True)
    ]
    name = portable_path(str(output))
    fused = FileFacts(
        name,
        folder_digest(output) if output.is_dir() else file_digest(output),
        size_of(output),
        _count(result.target.architecture.outline),
        _spec(fused_as),
        None,
    )
    return Report(
        shared,
        replace(result, warnings=warnings, notes=notes),
        tuple(files),
        fused,
        _portable_scores(scores),
        tuple(describe_groups(result)),
        fuse_command(shared, device),
        recipe_command(Path(portable_path(str(folder)))),
        device,
        versions(),
        datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )


def versions() -> dict[str, str]:
    """Returns what decides whether a fusion can be repeated to the last bit, by name."""
    from mergekit_ot import __version__

    return {
        "mergekit_ot": __version__,
        "torch": str(torch.__version__),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }


def accuracy_gap(score: Evaluation, other: Evaluation) -> float | None:
    """Returns by how many percent points a model is more accurate than another; None without accuracies."""
    return None if score.accuracy is None or other.accuracy is None else score.accuracy - other.accuracy


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _spec(make: Architecture) -> str:
    if "?" in make.name or not make.arguments:
        return portable_spec(make.name)
    return portable_spec(make.name + "?" + "&".join(f"{key}={value}" for key, value in make.arguments.items()))


def portable_recipe(recipe: FusionRecipe) -> FusionRecipe:
    """Returns a recipe in which no file is named by an absolute path."""
    named = {key: tuple(map(portable_path, getattr(recipe, key))) for key in ("models", "trust")}
    optional = {"report": portable_path, "data": portable_spec, "target": portable_spec}
    for key, rename in optional.items():
        value = getattr(recipe, key)
        named[key] = rename(value) if isinstance(value, str) else value
    return replace(
        recipe,
        **named,
        output=portable_path(recipe.output),
        arch=tuple(map(portable_spec, recipe.arch)),
        solver_options={key: portable_value(value) for key, value in recipe.solver_options.items()},
        repair_options={key: portable_value(value) for key, value in recipe.repair_options.items()},
    )


def _portable_scores(scores: Scores) -> Scores:
    missing, naive, path = map(portable_text, (scores.missing, scores.naive_missing, scores.path_missing))
    return replace(scores, missing=missing, naive_missing=naive, path_missing=path, data=portable_spec(scores.data))
