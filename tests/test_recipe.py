"""Recipes: a fusion as data, from flags and from YAML."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_ot.errors import RecipeError
from mergekit_ot.recipe import make_recipe


@given(st.lists(st.integers(0, 50), min_size=2, max_size=6).filter(lambda parts: sum(parts) > 0))
def test_weights_and_order_are_kept(parts: list[int]) -> None:
    weights = [part / sum(parts) for part in parts]
    names = [f"{index}.pt" for index in range(len(parts))][::-1]
    recipe = make_recipe(models=names, model_weights=weights)
    assert recipe.models == tuple(names)
    assert recipe.weights == tuple(weights)


def test_zero_and_one_are_weights_and_none_means_equal() -> None:
    assert make_recipe(models=["b", "a"], model_weights=(1.0, 0.0)).weights == (1.0, 0.0)
    assert make_recipe(models=["b", "a"], model_weights=(0, 1)).weights == (0.0, 1.0)
    assert make_recipe(models=["b", "a"]).weights == (0.5, 0.5)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1.5, -0.5), "at least zero"),
        ((0.5, float("nan")), "at least zero"),
        ((0.0, 0.0), "sum to 0"),
        ((1.0,), "1 model weights .* for 2 models"),
        ((0.5, float("inf")), "at least zero"),
    ],
)
def test_model_weights_that_do_not_fit(weights: tuple[float, ...], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe(models=["a", "b"], model_weights=weights)


def test_counts_of_samples_are_weights() -> None:
    assert make_recipe(models=["a", "b"], model_weights=(100, 300)).weights == (0.25, 0.75)
    nearly = make_recipe(models=["a", "b"], model_weights=(0.5, 0.5 + 2e-6)).weights
    assert abs(math.fsum(nearly) - 1) < 1e-12


def test_weights_within_rounding_are_accepted() -> None:
    assert len(make_recipe(models=["a", "b", "c"], model_weights=(0.333333, 0.333333, 0.333334)).weights) == 3


def test_file_and_flags_mean_the_same(tmp_path: Path) -> None:
    flags = {
        "models": ["a", "b"],
        "solver": "gwb",
        "solver_options": {"alpha": 0.5},
        "model_weights": (0.25, 0.75),
        "target": 1,
        "input_shape": (1, 28, 28),
        "arch": ["nets.py:mlp"],
        "seed": 3,
    }
    recipe = make_recipe(**flags)
    recipe.write(tmp_path / "fuse.yaml")
    assert make_recipe(tmp_path / "fuse.yaml") == recipe


def test_flags_override_the_file(tmp_path: Path) -> None:
    (tmp_path / "fuse.yaml").write_text(
        "models: [a, b]\nsolver: gwb\nmodel-weights: [1, 0]\nseed: 3\nsolver_options: {alpha: 1, steps: 2}\n"
        "arch: nets.py:mlp\n"
    )
    recipe = make_recipe(
        tmp_path / "fuse.yaml", solver="wb", seed=0, target=0, model_weights=None, solver_options={"alpha": 2}
    )
    assert (recipe.solver, recipe.seed, recipe.weights, recipe.models) == ("wb", 0, (1.0, 0.0), ("a", "b"))
    assert recipe.solver_options == {"alpha": 2, "steps": 2}
    assert recipe.arch == ("nets.py:mlp",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("solvr: wb", "Unknown recipe key 'solvr'. Did you mean 'solver'.*models, output"),
        ("seed: many", "Recipe key 'seed' is 'many'"),
        ("calibration_size: 0", "calibration_size"),
        ("- wb", "is not a recipe"),
        ("a: [", "not valid YAML"),
    ],
)
def test_recipe_errors(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "fuse.yaml").write_text(text)
    with pytest.raises(RecipeError, match=message):
        make_recipe(tmp_path / "fuse.yaml", models=["a", "b"])


def test_missing_recipe_and_too_few_models(tmp_path: Path) -> None:
    (tmp_path / "fuse.yaml").write_text("solver: wb")
    with pytest.raises(RecipeError, match=r"Did you mean .*fuse.yaml"):
        make_recipe(tmp_path / "fused.yaml", models=["a", "b"])
    with pytest.raises(RecipeError, match=r"at least two models; 1 given"):
        make_recipe(models=["a"])
    with pytest.raises(RecipeError, match=r"target 2 does not exist: with 2 models it is 0 to 1"):
        make_recipe(models=["a", "b"], target=2)
    with pytest.raises(RecipeError, match=r"3 architectures for 2 models"):
        make_recipe(models=["a", "b"], arch=["x", "y", "z"])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("slices:\n- sources: [{model: a, layer_range: [0, 1]}]\nmerge_method: passthrough\n", "slices of layers"),
        (f"seed: {'9' * 5000}\n", "is not valid YAML: a whole number has thousands of digits."),
    ],
)
def test_what_a_recipe_cannot_be_is_said_without_advice_that_helps_nobody(
    content: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=re.escape(said)):
        make_recipe(path)
