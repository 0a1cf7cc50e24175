"""Recipes of mergekit, and recipes that are saved: what they become, and in which line they are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from mergekit_ot import default_manager, load_checkpoint
from mergekit_ot.errors import MergeotError, RecipeError
from mergekit_ot.jobs.fusing import check_methods, run_fuse
from mergekit_ot.recipe import FusionRecipe, make_recipe
from mergekit_ot.recipe_files.mergekit import translated
from mergekit_ot.recipe_files.own_methods import OWN_METHODS
from mergekit_ot.storage.yaml_files import read_yaml

_TWO = "models:\n- model: a.pt\n- model: b.pt\n"


def _made(folder: Path, text: str) -> tuple[FusionRecipe, list[str]]:
    (folder / "mk.yml").write_text(text)
    notes: list[str] = []
    return make_recipe(folder / "mk.yml", notes.append), notes


@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=5).filter(any), st.sampled_from(["weight_matching", "wb", "gwb"])
)
def test_models_weights_and_method_are_taken_over(
    tmp_path_factory: pytest.TempPathFactory, weights: list[int], method: str
) -> None:
    models = [{"model": f"m{place}.pt", "parameters": {"weight": weight}} for place, weight in enumerate(weights)]
    text = yaml.safe_dump({"merge_method": method, "models": models})
    recipe, notes = _made(tmp_path_factory.mktemp("recipe"), text)
    assert recipe.models == tuple(f"m{place}.pt" for place in range(len(weights)))
    assert recipe.weights == pytest.approx([weight / sum(weights) for weight in weights])
    assert recipe.solver == method.replace("_", "-")
    assert bool(notes) == (sum(weights) != 1)


def test_everything_else_that_can_be_had(tmp_path: Path) -> None:
    text = _TWO + (
        "merge_method: weight-matching\nbase_model: b.pt\ndtype: bfloat16\narch: nets.py:net\nseed: 3\n"
        "parameters: {normalize: true, int8_mask: true, max_sweeps: 4}\noutput: merged.pt\n"
    )
    recipe, notes = _made(tmp_path, text)
    assert (recipe.models, recipe.solver, recipe.target) == (("a.pt", "b.pt"), "weight-matching", 1)
    assert (recipe.dtype, recipe.arch, recipe.seed, recipe.output) == ("bfloat16", ("nets.py:net",), 3, "merged.pt")
    assert recipe.solver_options == {"max_sweeps": 4}
    assert recipe.model_weights is None
    assert len(notes) == 2
    other, said = _made(tmp_path, f"{_TWO}merge_method: wb\nbase_model: c.pt\n")
    assert other.target == 0
    assert "base_model 'c.pt' is left out" in said[0]


def test_one_slice_of_all_layers_is_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps({"num_hidden_layers": 4}))
    text = "merge_method: wb\nslices:\n- sources:\n  - model: one\n    layer_range: [0, 4]\n  - model: two\n"
    assert _made(tmp_path, text)[0].models == ("one", "two")
    with pytest.raises(RecipeError, match=r"layer_range \[0, 3\].*'one' has 4.*line 5 of"):
        _made(tmp_path, text.replace("4]", "3]"))
    Path("one", "config.json").unlink()
    with pytest.raises(RecipeError, match=r"how many 'one' has is not known"):
        _made(tmp_path, text)


@pytest.mark.parametrize("method", sorted(OWN_METHODS))
def test_methods_of_mergekit_give_the_command_that_aligns(method: str, tmp_path: Path) -> None:
    for spelled in (method, method.replace("_", "-")):
        with pytest.raises(RecipeError) as error:
            _made(tmp_path, f"{_TWO}base_model: my base\nmerge_method: {spelled}\n")
        assert "mergeot align 'my base' a.pt b.pt -o aligned" in str(error.value)
        assert "line 5 of" in str(error.value)


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (
            f"{_TWO}merge_metod: wb\n",
            4,
            "Unknown recipe key 'merge_metod'. Did you mean 'merge_method'? Valid keys: arch",
        ),
        (_TWO, 1, "add 'merge_method: wb'"),
        (f"{_TWO}solver: wb\n", 1, "add 'merge_method: wb'"),
        (f"{_TWO}merge_method: [wb]\n", 4, "has to be the name of a solver"),
        (f"{_TWO}merge_method: wb\ntokenizer_source: union\n", 5, "keeps the vocabulary of its sources"),
        (f"{_TWO}merge_method: wb\nsolver: gwb\n", 5, "says the same as merge_method"),
        (f"{_TWO}merge_method: wb\nbase_model: [c]\n", 5, "has to be the name of a model"),
        (f"{_TWO}merge_method: wb\nparameters: 3\n", 5, "has to hold names and values"),
        (f"{_TWO}merge_method: wb\nseed: many\n", 5, "Recipe key 'seed' is 'many'"),
        ("models:\n- model: a.pt\n- modl: b.pt\nmerge_method: wb\n", 3, "A model is '- model: NAME'"),
        (
            "models:\n- model: a.pt\n- model: b.pt\n  weight: 1\nmerge_method: wb\n",
            4,
            "Unknown key of a model 'weight'",
        ),
        (
            "models:\n- model: a.pt\n  parameters:\n    density: 1\n- model: b.pt\nmerge_method: wb\n",
            4,
            "'density' of a single model is not understood. Valid keys: weight.",
        ),
        ("models:\n- model: a.pt\n  parameters: {weight: 1}\n- model: b.pt\nmerge_method: wb\n", 4, "has no weight"),
        ("models:\n- model: a.pt\n  parameters: {weight: -1}\n- model: b.pt\nmerge_method: wb\n", 3, "at least zero"),
        (
            "models:\n- model: a\n  parameters:\n    weight: [{filter: mlp, value: 1}]\n- model: b\nmerge_method: wb\n",
            4,
            "filters",
        ),
        (f"{_TWO}merge_method: wb\nparameters: {{weight: {10**400}}}\n", 2, "at least zero"),
        (f"{_TWO}merge_method: wb\nparameters: {{weight: .nan}}\n", 2, "number of at least zero"),
        (f"{_TWO}merge_method: wb\nparameters: {{weight: 0}}\n", 1, "All weights are zero"),
        (f"{_TWO}merge_method: wb\nparameters: {{weight: 1, normalize: false}}\n", 5, "normalize has to be true"),
        ("models: 3\nmerge_method: wb\n", 1, "has to be a list of models"),
        (f"{_TWO}merge_method: wb\nslices: []\n", 5, "both given"),
        ("merge_method: wb\nslices:\n- sources: [{model: a}]\n- sources: [{model: b}]\n", 2, "slices of layers"),
    ],
)
def test_what_cannot_be_had_is_told_with_its_line(text: str, line: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as error:
        _made(tmp_path, text)
    assert said in str(error.value)
    assert f"line {line} of '{tmp_path / 'mk.yml'}'" in str(error.value)


def test_weights_over_the_layers_are_rules_where_there_are_any(tmp_path: Path) -> None:
    path = tmp_path / "mk.yml"
    path.write_text(
        "merge_method: wb\nmodels:\n- {model: a, parameters: {weight: [0, 1]}}\n- {model: b, parameters: {weight: 1}}\n"
    )
    file = read_yaml(path, RecipeError)
    content = translated(file, ("arch", "layers")).content
    path.write_text(path.read_text() + "layers: [{parameters: fc, keep: 1}]\n")
    both = translated(read_yaml(path, RecipeError), ("arch", "layers")).content
    assert both["layers"] == [*content["layers"], {"parameters": "fc", "keep": 1}]
    assert content["layers"] == [{"parameters": "*", "weights": [[0.0, 1.0], 1.0]}]
    with pytest.raises(RecipeError, match=r"Weights over the layers .*line 3 of"):
        translated(file, ("arch",))


# Own recipes.


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("solvr: wb", "Unknown recipe key 'solvr'"),
        ("seed: -1", "'seed'"),
        ("solver: wbb", "Unknown solver 'wbb'"),
        ("measure: weight", "Did you mean 'weights'"),
        ("repair: magic", "Unknown repair 'magic'"),
        ("executor: cereal", "Unknown executor"),
        ("dtype: float8", "Unknown dtype 'float8'. Did you mean 'float"),
        ("solver_options: {no_such: 1}", "Unknown option of solver 'wb' 'no_such'"),
    ],
)
def test_every_key_that_is_wrong_is_told_with_its_line(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yml"
    path.write_text(f"models: [a.pt, b.pt]\n\n{line}\n")
    with pytest.raises(MergeotError) as error:
        check_methods(make_recipe(path), default_manager(), path)
    assert said in str(error.value)
    assert f"line 3 of '{path}'" in str(error.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("model_weights: [1, 2, 3]", "3 model weights"),
        ("target: 7", "target 7"),
        ("arch: [a, b, c]", "3 architectures"),
    ],
)
def test_keys_that_do_not_fit_each_other_are_told_with_a_line(line: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "own.yml"
    path.write_text(f"models: [a.pt, b.pt]\n\n{line}\n")
    with pytest.raises(RecipeError, match=said) as error:
        make_recipe(path)
    assert f"line 3 of '{path}'" in str(error.value)


def test_a_flag_that_is_wrong_is_not_told_as_a_line_of_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "own.yml"
    path.write_text("models: [a.pt, b.pt]\nsolver: wb\n")
    with pytest.raises(RecipeError) as error:
        check_methods(make_recipe(path, solver="wbb"), default_manager(), path)
    assert "line" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: ['a.pt, b.pt]\nsolver: wb\n", "line 1: a quote is opened and not closed"),
        ('seed: 3\nmodels: ["a.pt", "b.pt]\n', "line 2: a quote is opened and not closed"),
        ("models: [a.pt, b.pt\nsolver: wb\n", "in the list in brackets that begins in line 1"),
        ("models: [a.pt, b.pt]\narch: [nets.py:net?h=3]\n", "must stand in quotes"),
    ],
)
def test_what_is_no_yaml_is_told_with_its_line(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "own.yml").write_text(text)
    with pytest.raises(RecipeError, match="is not valid YAML") as error:
        make_recipe(tmp_path / "own.yml")
    assert said in str(error.value)
    assert "unicode string" not in str(error.value)


def _save_two() -> None:
    for seed, name in enumerate(("a.pt", "b.pt")):
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        torch.save(network.state_dict(), name)
    Path("nets.py").write_text(
        "from torch import nn\nnet = lambda h=8: nn.Sequential(nn.Linear(4, h), nn.ReLU(), nn.Linear(h, 2))\n"
    )


def test_a_saved_recipe_repeats_the_fusion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _save_two()
    flags = {"models": ["a.pt", str(tmp_path / "b.pt")], "arch": ["nets.py:net?h=8"], "solver": "weight-matching"}
    recipe = make_recipe(**flags, output="one.pt", model_weights=(0.25, 0.75), seed=3, dtype="float16")
    said: list[str] = []
    run_fuse(recipe, default_manager(), said.append, save_recipe=Path("run.yml"))
    text = Path("run.yml").read_text()
    assert str(tmp_path) not in text
    assert any("names no absolute path" in sentence for sentence in said)
    again = make_recipe("run.yml", output="two.pt")
    run_fuse(again, default_manager(), said.append, recipe_file=Path("run.yml"))
    one, two = (load_checkpoint(name).state for name in ("one.pt", "two.pt"))
    assert {name: one[name].dtype for name in one} == dict.fromkeys(one, torch.float16)
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(MergeotError, match="is the input"):
        run_fuse(again, default_manager(), said.append, recipe_file=Path("run.yml"), save_recipe=Path("run.yml"))
    with pytest.raises(RecipeError, match="are both"):
        run_fuse(again, default_manager(), said.append, save_recipe=Path("two.pt"))


def test_a_dry_run_saves_no_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _save_two()
    recipe = make_recipe(models=["a.pt", "b.pt"], arch=["nets.py:net"])
    said: list[str] = []
    run_fuse(recipe, default_manager(), said.append, dry_run=True, save_recipe=Path("run.yml"))
    assert not Path("run.yml").exists()
    assert any("'run.yml' was not written" in sentence for sentence in said)


def test_numbers_too_large_for_a_type_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save({"weight": torch.full((2, 3), 1e6)}, name)
    recipe = make_recipe(models=["a.pt", "b.pt"], solver="average", dtype="float16")
    with pytest.raises(MergeotError, match="'weight' holds numbers that float16 cannot"):
        run_fuse(recipe, default_manager(), lambda text: None)
    assert not Path("fused.pt").exists()
