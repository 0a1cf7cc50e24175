"""Folders that are damaged, incomplete, or made by somebody who wishes us ill: one clear message, nothing is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from hf_models import fresh, loaded, network_of, saved
from safetensors.torch import load_file, save_file

from mergekit_ot import ArchitectureError, CheckpointError, load_checkpoint, save_checkpoint
from mergekit_ot.hooks.manager import default_manager
from mergekit_ot.sources.reading import read_sources


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved("llama_tied", 1, tmp_path / "net", shard="8KB")


def configured(folder: Path, **values: Any) -> Path:
    content = json.loads((folder / "config.json").read_text())
    content |= values
    (folder / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value != "drop"}))
    return folder


def indexed(folder: Path, change: Any) -> None:
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    change(content["weight_map"])
    index.write_text(json.dumps(content))


@pytest.mark.parametrize("place", ["../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "a\\b", "", 7])
def test_an_index_names_files_of_its_folder_only(folder: Path, place: object) -> None:
    (folder.parent / "secret.safetensors").write_bytes((next(folder.glob("model-*"))).read_bytes())
    indexed(folder, lambda places: places.update({"model.norm.weight": place}))
    with pytest.raises(CheckpointError, match="is no file name in its folder"):
        load_checkpoint(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(CheckpointError, match=r"is not whole: model-00002.* are missing"):
        load_checkpoint(folder)


def test_an_index_that_lies_is_told(folder: Path) -> None:
    indexed(folder, lambda places: places.update({"model.more.weight": min(places.values())}))
    with pytest.raises(CheckpointError, match=r"'model\.more\.weight' stands in .*, and it does not"):
        load_checkpoint(folder)


def test_one_tensor_stands_in_one_file(folder: Path) -> None:
    shards = sorted(folder.glob("model-0*"))
    both = load_file(shards[0]) | load_file(shards[1])
    save_file(both, shards[1], metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="stands in two files"):
        load_checkpoint(folder)


@pytest.mark.parametrize("text", ["[1]", "{", "[" * 100_000, '{"architectures": ' + '{"a":' * 50_000, ""])
def test_a_configuration_that_is_none_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_checkpoint(folder)


def test_a_configuration_cannot_ask_for_the_world(folder: Path) -> None:
    configured(folder, num_hidden_layers=10**9)
    with pytest.raises(
        CheckpointError, match="asks for num_hidden_layers = 1000000000, and the weights have 20 tensors"
    ):
        load_checkpoint(folder)


def test_quantised_weights_are_refused(folder: Path) -> None:
    configured(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match=r"quantised \(gptq\)"):
        load_checkpoint(folder)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"architectures": "drop"}, "names no class"),
        ({"architectures": ["OwnModel"], "auto_map": {"AutoModel": "own.OwnModel"}}, "is code of the folder itself"),
        ({"architectures": ["NobodyHasThisModel"]}, "is none of transformers"),
        ({"architectures": ["LlamaConfig"]}, "is none of transformers"),
        ({"architectures": ["pipeline"]}, "is none of transformers"),
        ({"architectures": ["__builtins__"]}, "is none of transformers"),
        ({"architectures": ["os.system"]}, "is none of transformers"),
        ({"hidden_size": "wide"}, "config.json is none of LlamaForCausalLM"),
        ({"model_type": "nothing"}, "config.json is none of LlamaForCausalLM"),
    ],
)
def test_why_a_network_cannot_be_built_is_said(folder: Path, values: dict[str, Any], reason: str) -> None:
    (folder / "own.py").write_text("raise SystemExit('was run')")
    checkpoint = load_checkpoint(configured(folder, **values))
    assert checkpoint.build is None
    assert reason in checkpoint.found
    # Its weights are there all the same, under the names of the disk.
    assert "model.norm.weight" in checkpoint.state
    with pytest.raises(ArchitectureError, match="Pass --arch SPEC"):
        read_sources([str(folder)], [], default_manager(), lambda text: None)


def test_code_beside_a_known_class_is_neither_run_nor_copied(folder: Path) -> None:
    (folder / "modeling.py").write_text("raise SystemExit('was run')")
    before = set(sys.modules)
    checkpoint = load_checkpoint(configured(folder, auto_map={"AutoModelForCausalLM": "modeling.Net"}))
    assert checkpoint.build is not None
    save_checkpoint(dict(checkpoint.state), folder.parent / "copy", template=checkpoint)
    assert not (folder.parent / "copy" / "modeling.py").exists()
    assert "auto_map" not in json.loads((folder.parent / "copy" / "config.json").read_text())
    assert not any(name.rpartition(".")[2] == "modeling" for name in set(sys.modules) - before)


def test_a_configuration_chooses_no_kernels(folder: Path) -> None:
    checkpoint = load_checkpoint(configured(folder, attn_implementation="somebody/kernel", dtype="bfloat16"))
    network = network_of(checkpoint)
    assert network.config.to_dict().get("attn_implementation") in (None, "sdpa", "eager")
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}


def test_a_link_out_of_the_folder_is_not_copied(folder: Path) -> None:
    (folder.parent / "private.txt").write_text("secret")
    (folder / "vocab.txt").symlink_to(folder.parent / "private.txt")
    checkpoint = load_checkpoint(folder)
    with pytest.raises(CheckpointError, match="is a link to a file outside of its folder"):
        save_checkpoint(dict(checkpoint.state), folder.parent / "copy", template=checkpoint)
    assert not (folder.parent / "copy").exists()


def test_what_belongs_to_a_folder_is_copied_and_nothing_else(folder: Path) -> None:
    taken = (
        "tokenizer.json",
        "special_tokens_map.json",
        "preprocessor_config.json",
        "merges.txt",
        "spiece.model",
        "LICENSE",
    )
    left = (
        "optimizer.pt",
        "training_args.bin",
        "trainer_state.json",
        "onnx.onnx",
        "run.py",
        ".gitattributes",
        "README.md",
    )
    for name in (*taken, *left):
        (folder / name).write_text(f"theirs: {name}")
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"name_or_path": "/home/somebody/net", "padding_side": "left"})
    )
    (folder / "modules.json").write_text(
        json.dumps([{"path": "", "type": "T"}, {"path": "1_Pooling"}, {"path": "../net"}])
    )
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "config.json").write_text("{}")
    checkpoint = load_checkpoint(folder)
    copy = folder.parent / "copy"
    save_checkpoint(
        dict(checkpoint.state), copy, template=checkpoint, provenance={"made_by": "mergekit_ot", "sources": []}
    )
    assert all((copy / name).read_text() == f"theirs: {name}" for name in taken)
    assert not any((copy / name).is_file() and (copy / name).read_text() == f"theirs: {name}" for name in left)
    assert (copy / "1_Pooling" / "config.json").is_file()
    assert not (copy / "checkpoint-5").exists()
    assert json.loads((copy / "tokenizer_config.json").read_text()) == {"padding_side": "left"}
    assert all("/home/somebody" not in file.read_text(errors="ignore") for file in copy.rglob("*") if file.is_file())


def test_old_names_and_masks_are_understood(tmp_path: Path) -> None:
    """GPT-2 as it stands on the hub: without the prefix of its base, and with the masks of old versions."""
    folder = saved("gpt2", 1, tmp_path / "net")
    state = load_file(folder / "model.safetensors")
    old = {name.removeprefix("transformer."): tensor for name, tensor in state.items()}
    old |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16).tril(), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(old, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = load_checkpoint(folder)
    assert "'h.0.attn.bias'" in checkpoint.found
    assert all(torch.equal(checkpoint.state[name], tensor) for name, tensor in state.items())
    save_checkpoint(dict(checkpoint.state), tmp_path / "copy", template=checkpoint)
    assert set(load_file(tmp_path / "copy" / "model.safetensors")) == {n.removeprefix("transformer.") for n in state}
    assert not loaded("gpt2", tmp_path / "copy")[1]["missing_keys"]


def test_pickled_weights_are_read_and_become_safetensors(tmp_path: Path) -> None:
    folder = saved("llama", 1, tmp_path / "net")
    (folder / "model.safetensors").unlink()
    torch.save(fresh("llama", 1).state_dict(), folder / "pytorch_model.bin")
    checkpoint = load_checkpoint(folder)
    save_checkpoint(dict(checkpoint.state), tmp_path / "copy", template=checkpoint)
    theirs = loaded("llama", tmp_path / "copy")[0].state_dict()
    assert all(torch.equal(theirs[name], tensor) for name, tensor in fresh("llama", 1).state_dict().items())


def test_what_is_no_longer_tied_is_loaded_apart(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    state = dict(checkpoint.state)
    state["lm_head.weight"] = state["model.embed_tokens.weight"] + 1
    save_checkpoint(state, folder.parent / "copy", template=checkpoint)
    written, _ = loaded("llama_tied", folder.parent / "copy")
    assert torch.equal(written.lm_head.weight, state["lm_head.weight"])
    assert torch.equal(written.model.embed_tokens.weight, state["model.embed_tokens.weight"])


def test_a_file_of_a_folder_leads_to_the_folder(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is the index of weights .* Name its folder"):
        load_checkpoint(folder / "model.safetensors.index.json")
    with pytest.raises(ArchitectureError, match=r"Or name its folder, '.*net', whose config\.json says"):
        read_sources([str(next(folder.glob("model-0*")))], [], default_manager(), lambda text: None)


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="merge_and_unload"):
        load_checkpoint(folder)


def test_an_output_that_fails_leaves_nothing(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    state = {name: tensor for name, tensor in checkpoint.state.items() if "norm" not in name}
    with pytest.raises(CheckpointError, match="is missing in the state"):
        save_checkpoint(state, folder.parent / "copy", template=checkpoint)
    assert [path.name for path in folder.parent.iterdir()] == ["net"]


def test_a_file_name_stays_a_file(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    for name in ("fused.pt", "fused.safetensors"):
        save_checkpoint(dict(checkpoint.state), folder.parent / name, template=checkpoint)
        assert (folder.parent / name).is_file()
        assert load_checkpoint(folder.parent / name).state.keys() == checkpoint.state.keys()


def test_folders_of_one_configuration_have_one_architecture(folder: Path) -> None:
    other = configured(saved("llama_tied", 2, folder.parent / "other"), transformers_version="4.40.0", dtype="bfloat16")
    first, second = read_sources([str(folder), str(other)], [], default_manager(), lambda text: None)
    assert first.known is second.known
