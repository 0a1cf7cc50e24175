"""The experiments by name, and how one is looked up."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_ot import RecipeError
from mergekit_ot.errors import unknown_name
from mergeot_experiments.catalogue.deep import RESIDUAL_WITHOUT_NORM, VGG
from mergeot_experiments.catalogue.descriptions import DIGITS, FULL, QUICK, Experiment
from mergeot_experiments.catalogue.feed_forward import GROWTH, HETEROGENEOUS, MLP, WIDTHS
from mergeot_experiments.catalogue.recurrent import RECURRENT, RECURRENT_GROWTH, RECURRENT_LONG, RECURRENT_WIDTHS
from mergeot_experiments.catalogue.residual import RESIDUAL
from mergeot_experiments.catalogue.transformers import DEEP_TRANSFORMERS, TRANSFORMERS
from mergeot_experiments.sources.data import has_folder

ALL = "all"
EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        MLP,
        WIDTHS,
        GROWTH,
        HETEROGENEOUS,
        RECURRENT,
        RECURRENT_LONG,
        RECURRENT_WIDTHS,
        RECURRENT_GROWTH,
        RESIDUAL,
        VGG,
        RESIDUAL_WITHOUT_NORM,
        TRANSFORMERS,
        DEEP_TRANSFORMERS,
    )
}


def find_experiments(names: Sequence[str]) -> list[Experiment]:
    """Returns the experiments of these names; ``all`` stands for every one.

    Raises:
        RecipeError: A name is unknown.
    """
    for name in names:
        if name not in EXPERIMENTS and name != ALL:
            raise RecipeError(unknown_name("experiment", name, [*EXPERIMENTS, ALL]))
    return list(EXPERIMENTS.values()) if ALL in names else [EXPERIMENTS[name] for name in dict.fromkeys(names)]


def choose_scale(experiment: Experiment, is_full: bool) -> str:
    """Returns the scale to run at: without a data folder, the digits take the place of the quick one."""
    if is_full:
        return FULL
    return QUICK if has_folder() or DIGITS not in experiment.designs else DIGITS
