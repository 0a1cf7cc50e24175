"""Folders of the transformers library as sources and as outputs, against what the library itself makes of them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import mergeot_executors
import mergeot_frontends
import mergeot_layers
import mergeot_matching
import mergeot_measures
import mergeot_repair
import mergeot_safetensors
import mergeot_transformers
import mergeot_wasserstein
import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("transformers")

from hf_models import NETWORKS, apart, loaded, network_of, saved

from mergekit_ot import CheckpointError, load_checkpoint, save_checkpoint
from mergekit_ot.cli.app import build_app
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.testing import check_store

PLUGINS = (
    mergeot_executors,
    mergeot_frontends,
    mergeot_layers,
    mergeot_matching,
    mergeot_measures,
    mergeot_repair,
    mergeot_safetensors,
    mergeot_transformers,
    mergeot_wasserstein,
)
# One that is renamed on the disk; the others stand in the slow table.
QUICK = ("vit",)
TABLE = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NETWORKS]
KINDS = [(torch.float32, "1GB"), (torch.bfloat16, "8KB")]


def run(*arguments: object):
    return CliRunner().invoke(build_app(PluginManager(PLUGINS)), [str(argument) for argument in arguments])


def ran(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def raw(folder: Path) -> dict[str, torch.Tensor]:
    """Returns the tensors of a folder as they stand on the disk."""
    from safetensors.torch import load_file

    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_folder_reads_as_the_library_reads_it(name: str, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(saved(name, 1, tmp_path / "net", shard="8KB"))
    theirs = loaded(name, tmp_path / "net")[0].state_dict()
    held = dict(checkpoint.state)
    assert set(held) <= set(theirs)
    assert all(torch.equal(theirs[key], tensor) for key, tensor in held.items())
    ours = network_of(checkpoint).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_state_is_written_as_it_was_read(name: str, tmp_path: Path) -> None:
    folder = saved(name, 1, tmp_path / "net", torch.bfloat16, "8KB")
    checkpoint = load_checkpoint(folder)
    save_checkpoint(dict(checkpoint.state), tmp_path / "copy", template=checkpoint)
    before, after = raw(folder), raw(tmp_path / "copy")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
    names = {file.name for file in folder.iterdir()}
    assert {file.name for file in (tmp_path / "copy").iterdir()} == names | {"README.md", "mergeot.json"}
    assert (tmp_path / "copy" / "config.json").read_bytes() == (folder / "config.json").read_bytes()


@pytest.mark.parametrize("name", ["mixtral", "llama_tied"])
def test_the_tensors_keep_the_contract_of_a_store(name: str, tmp_path: Path) -> None:
    check_store(load_checkpoint(saved(name, 1, tmp_path / "net", shard="8KB")).state)


@pytest.mark.parametrize("name", TABLE)
def test_the_inputs_of_a_configuration_run_it(name: str, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(saved(name, 1, tmp_path / "net"))
    network = network_of(checkpoint)
    network.load_state_dict(dict(checkpoint.state), strict=False)
    inputs = checkpoint.example_inputs or ()
    given = network(*inputs)
    theirs, _ = loaded(name, tmp_path / "net")
    output = theirs(**dict(zip(network.mergeot_inputs, inputs, strict=True)))
    first = given[0] if isinstance(given, tuple) else given
    keys = ("logits", "logits_per_image", "last_hidden_state")
    expected = next(output[key] for key in keys if key in output)
    assert torch.allclose(first, expected, atol=1e-5)


@pytest.mark.parametrize("name", TABLE)
def test_an_aligned_folder_computes_what_its_source_computes(name: str, tmp_path: Path) -> None:
    first, second = saved(name, 1, tmp_path / "one"), saved(name, 2, tmp_path / "two", shard="20KB")
    ran("align", first, second, "-o", f"{tmp_path / 'aligned'}/", "--solver", "wb")
    assert [path.name for path in (tmp_path / "aligned").iterdir()] == ["two"]
    written, info = loaded(name, tmp_path / "aligned" / "two")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert apart(written, loaded(name, second)[0], name) < 1e-4
    before, after = raw(second), raw(tmp_path / "aligned" / "two")
    assert before.keys() == after.keys()
    # It is not the same file again: neurons stand elsewhere.
    assert any(not torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("kind", "shard"), KINDS, ids=["float32", "bfloat16-shards"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in NETWORKS])
def test_a_fused_folder_is_what_the_library_loads(name: str, kind: torch.dtype, shard: str, tmp_path: Path) -> None:
    first, second = (saved(name, seed, tmp_path / f"net{seed}", kind, shard) for seed in (1, 2))
    ran("fuse", first, second, "-o", tmp_path / "merged", "--solver", "wb")
    ran("align", first, second, "-o", tmp_path / "aligned", "--solver", "wb")
    _, info = loaded(name, tmp_path / "merged")
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    files = {file.name for file in first.iterdir()}
    assert {file.name for file in (tmp_path / "merged").iterdir()} == files | {"README.md", "mergeot.json"}
    tensors = raw(tmp_path / "merged")
    assert {tensor.dtype for tensor in tensors.values()} == {kind}
    # It is the mean of the reference and the aligned one, taken here on what stands on the disk.
    one, other = raw(first), raw(tmp_path / "aligned" / "net2")
    mean = {key: (one[key].double() + other[key].double()) / 2 for key in one}
    allowed = 1e-5 if kind is torch.float32 else 2e-2
    assert tensors.keys() == mean.keys()
    for key, tensor in tensors.items():
        assert torch.allclose(tensor.double(), mean[key], atol=allowed, rtol=allowed), key


@pytest.mark.slow
def test_the_other_commands_take_folders(tmp_path: Path) -> None:
    first, second = (saved("llama", seed, tmp_path / f"net{seed}") for seed in (1, 2))
    (tmp_path / "data.py").write_text(
        "import torch\n"
        "def text():\n"
        "    ids = torch.randint(3, 37, (6, 8), generator=torch.Generator().manual_seed(0))\n"
        "    return [(ids[:, :-1], ids[:, 1:])]\n"
    )
    data = f"{tmp_path / 'data.py'}:text"
    assert json.loads(run("check", first, "--json").stdout)["preserved"]
    assert "LlamaForCausalLM" in ran("inspect", first)
    assert "perplexity" in ran("eval", first, second, "--data", data)
    assert "aligned" in ran("barrier", first, second, "--data", data, "--points", "3", "--align", "wb")
    ran("fuse", first, second, "-o", tmp_path / "merged", "--data", data, "--report", tmp_path / "report")
    assert (tmp_path / "report" / "report.html").is_file()


@pytest.mark.slow
def test_mergekit_merges_aligned_folders(tmp_path: Path) -> None:
    """With the executable `mergekit-yaml` of the environment variable, or of the path."""
    tool = os.environ.get("MERGEOT_MERGEKIT") or shutil.which("mergekit-yaml")
    if tool is None:
        pytest.skip("mergekit-yaml is not installed: set MERGEOT_MERGEKIT to its path")
    first, second = (saved("llama", seed, tmp_path / f"net{seed}") for seed in (1, 2))
    ran("align", first, second, "-o", tmp_path / "aligned", "--solver", "wb")
    ran("fuse", first, second, "-o", tmp_path / "merged", "--solver", "wb")
    models = [str(first), str(tmp_path / "aligned" / "net2")]
    for method, parameters in (("linear", {"weight": 0.5}), ("slerp", {"t": 0.5}), ("ties", {"weight": 0.5})):
        recipe: dict[str, Any] = {"merge_method": method, "dtype": "float32"}
        recipe["models"] = [{"model": model, "parameters": {"weight": 0.5}} for model in models]
        recipe |= {} if method == "linear" else {"base_model": models[0], "parameters": parameters}
        (tmp_path / f"{method}.yml").write_text(json.dumps(recipe))
        command = [tool, str(tmp_path / f"{method}.yml"), str(tmp_path / method), "--copy-tokenizer"]
        own = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env={**own, "HF_HUB_OFFLINE": "1"})
        assert done.returncode == 0, done.stderr[-2000:]
        assert apart(loaded("llama", tmp_path / method)[0], loaded("llama", first)[0], "llama") < 10
    assert apart(loaded("llama", tmp_path / "linear")[0], loaded("llama", tmp_path / "merged")[0], "llama") < 1e-5


def test_what_stands_in_a_folder_decides_what_may_be_replaced(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(saved("bert_bare", 1, tmp_path / "net"))
    state, place = dict(checkpoint.state), tmp_path / "merged"
    place.mkdir()
    save_checkpoint(state, place, template=checkpoint)  # an empty folder
    save_checkpoint(state, place, template=checkpoint)  # what we wrote ourselves
    (place / "README.md").write_text("my own words")
    with pytest.raises(CheckpointError, match=r"changed since then: README\.md"):
        save_checkpoint(state, place, template=checkpoint)
    assert (place / "README.md").read_text() == "my own words"
    save_checkpoint(state, place, template=checkpoint, overwrite=True)
    (place / "results").mkdir()
    (place / "results" / "scores.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"more stands in it since then: results/scores\.txt"):
        save_checkpoint(state, place, template=checkpoint, overwrite=True)
    with pytest.raises(CheckpointError, match="was not written by mergeot"):
        save_checkpoint(state, tmp_path / "net", template=checkpoint, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "net"]


def test_a_folder_as_the_target_gives_sizes_and_form(tmp_path: Path) -> None:
    first, second = (saved("bert_bare", seed, tmp_path / f"net{seed}") for seed in (1, 2))
    wide = saved("bert_bare", 3, tmp_path / "wide", intermediate_size=64)
    ran("fuse", first, second, "-o", tmp_path / "merged", "--solver", "wb", "--target", wide)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["intermediate_size"] == 64
    shapes = {name: tensor.shape for name, tensor in raw(tmp_path / "merged").items()}
    assert shapes == {name: tensor.shape for name, tensor in raw(wide).items()}
    assert not loaded("bert_bare", tmp_path / "merged")[1]["missing_keys"]


def test_a_repository_in_the_cache_is_found_without_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants

    revision = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / "hub" / "models--somebody--net"
    folder = saved("bert_bare", 1, place / "snapshots" / revision)
    (place / "blobs").mkdir()
    for file in list(folder.iterdir()):
        file.rename(place / "blobs" / file.name)
        file.symlink_to(Path("..") / ".." / "blobs" / file.name)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(revision)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    for name in ("somebody/net", "somebody/net@main", f"somebody/net@{revision}"):
        checkpoint = load_checkpoint(name)
        assert checkpoint.path == folder
        save_checkpoint(dict(checkpoint.state), tmp_path / "copy", template=checkpoint)
    assert not any(file.is_symlink() for file in (tmp_path / "copy").iterdir())
    for name in ("somebody/other", "somebody/net@v2"):
        with pytest.raises(CheckpointError, match="There is no file"):
            load_checkpoint(name)


def test_another_type_of_numbers_stands_in_the_configuration_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForImageClassification

    folders = [saved("vit", seed, tmp_path / f"v{seed}") for seed in (0, 1)]
    monkeypatch.chdir(tmp_path)
    ran("fuse", *folders, "--dtype", "bfloat16")
    # Without a name, folders become a folder.
    Path("fused").rename("half")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    network = AutoModelForImageClassification.from_pretrained(tmp_path / "half", dtype="auto")
    assert {tensor.dtype for tensor in network.parameters()} == {torch.bfloat16}


def test_an_architecture_that_the_user_gives_counts(tmp_path: Path) -> None:
    first, second = (saved("vit", seed, tmp_path / f"net{seed}") for seed in (1, 2))
    (tmp_path / "nets.py").write_text(
        "from transformers import AutoConfig, AutoModelForImageClassification\n"
        "def net(folder):\n"
        "    return AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(folder))\n"
    )
    spec = f"{tmp_path / 'nets.py'}:net?folder={first}"
    ran(
        "align", first, second, "-o", tmp_path / "aligned", "--solver", "wb", "--arch", spec, "--input-shape", "3,16,16"
    )
    assert apart(loaded("vit", tmp_path / "aligned" / "net2")[0], loaded("vit", second)[0], "vit") < 1e-4


def test_a_whole_state_dict_of_a_tied_network_is_written_once(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(saved("llama_tied", 1, tmp_path / "net"))
    save_checkpoint(loaded("llama_tied", tmp_path / "net")[0], tmp_path / "copy", template=checkpoint)
    assert raw(tmp_path / "copy").keys() == raw(tmp_path / "net").keys()
