"""Files of tied networks: what they hold under one of two names is read, and what they hold besides is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import commands
from safetensors.torch import load_file, save_file
from slow_ones import first_of
from torch import Tensor, nn

from mergekit_ot import ArchitectureError, SourceModel, fuse, load_checkpoint
from mergekit_ot.storage.file_names import constant_kind

_FILES = {
    "nets.py": """
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

def gpt(tied=True):
    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    none = {"bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**sizes, **none, tie_word_embeddings=tied))

class Thrice(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(5, 5, bias=False) for _ in range(3))
        self.hidden, self.back = nn.Linear(5, 7, bias=False), nn.Linear(7, 5, bias=False)
        self.second.weight = self.third.weight = self.first.weight

    def forward(self, x):
        return self.third(self.second(self.back(self.hidden(self.first(x)).relu())))
""",
    "data.py": """
import torch

def text():
    tokens = torch.randint(11, (20, 9), generator=torch.Generator().manual_seed(0))
    return [(tokens[:, :-1], tokens[:, 1:])]
""",
}
_EMBEDDING, _HEAD = "transformer.wte.weight", "lm_head.weight"
_MASK = "transformer.h.0.attn.bias"
_ON = ("--arch", "nets.py:gpt")
Command = Callable[..., str]
Kept = dict[str, Tensor]


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Gives a way to run commands in a folder of networks; returns what they print."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    for name, content in _FILES.items():
        Path(name).write_text(content, encoding="utf-8")
    for seed, name in enumerate("ab"):
        _write(name, _net(seed).state_dict())

    return commands(capsys)


def _net(seed: int) -> nn.Module:
    import transformers

    torch.manual_seed(seed)
    sizes = {"vocab_size": 11, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.3}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, bos_token_id=None, eos_token_id=None)).eval()


def _write(name: str, state: dict[str, Tensor]) -> None:
    """Writes a state whole, without either of the tied names, and as the library used to write it."""
    plain = {key: value.clone() for key, value in state.items()}
    torch.save(plain, f"{name}.pt")
    without = {key: value for key, value in plain.items() if key != _HEAD}
    save_file(without, f"{name}.safetensors")
    torch.save({key: value for key, value in plain.items() if key != _EMBEDDING}, f"{name}-head.pt")
    mask = {_MASK: torch.ones(1, 1, 8, 8).tril(), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file({**without, **mask}, f"{name}-old.safetensors")


def _state(path: str) -> Kept:
    return load_file(path) if path.endswith("safetensors") else dict(load_checkpoint(path).state)


_KINDS = [".safetensors", "-head.pt", "-old.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", _KINDS)
@pytest.mark.parametrize("solver", ["weight-matching", "wb", "average"])
def test_a_tied_file_is_fused_like_a_whole_one_and_stays_as_it_is(command: Command, kind: str, solver: str) -> None:
    on = (*_ON, "--input-shape", "8", "--solver", solver)
    command("fuse", "a.pt", "b.pt", *on, "-o", "whole.pt")
    output = f"out{kind}"
    said = command("fuse", f"a{kind}", f"b{kind}", *on, "-o", output)
    assert "tied weights stand in the file once" in said
    whole, fused, source = _state("whole.pt"), _state(output), _state(f"a{kind}")
    assert fused.keys() == source.keys()
    for name, tensor in fused.items():
        wanted = whole.get(name, source[name])
        assert torch.equal(tensor, wanted), name
    assert torch.equal(whole[_EMBEDDING], whole[_HEAD])


@pytest.mark.slow
def test_the_fused_file_has_the_names_of_the_first_one_whatever_the_others_have(command: Command) -> None:
    on = (*_ON, "--input-shape", "8", "--solver", "weight-matching")
    names = ["a.pt", "a.safetensors", "a-head.pt", "a-old.safetensors"]
    fused = {}
    for name, other in zip(names, ["b-old.safetensors", "b-head.pt", "b.pt", "b.safetensors"], strict=True):
        output = f"fused-{name}"
        command("fuse", name, other, *on, "-o", output)
        fused[name] = _state(output)
        assert fused[name].keys() == _state(name).keys()
    for state in fused.values():
        for name in state.keys() & fused["a.pt"].keys():
            assert torch.equal(state[name], fused["a.pt"][name])


@pytest.mark.parametrize("kind", first_of(_KINDS))
def test_every_command_reads_tied_files(command: Command, kind: str) -> None:
    data = ("--data", "data.py:text")
    files = (f"a{kind}", f"b{kind}")
    scores = [json.loads(command("eval", *names, *_ON, *data, "--json")) for names in (files, ("a.pt", "b.pt"))]
    assert [each["loss"] for each in scores[0]["models"]] == [each["loss"] for each in scores[1]["models"]]
    assert json.loads(command("check", files[0], *_ON, "--input-shape", "8", "--json"))["preserved"] is True
    curve = json.loads(command("barrier", *files, *_ON, *data, "--points", "3", "--align", "wb", "--json"))
    assert curve["loss"][0] == pytest.approx(scores[1]["models"][0]["loss"])
    command("align", *files, *_ON, "--input-shape", "8", "-o", "aligned")
    assert _state(f"aligned/b{kind}").keys() == _state(f"b{kind}").keys()
    aligned = json.loads(command("eval", f"aligned/b{kind}", *_ON, *data, "--json"))["models"][0]
    assert aligned["loss"] == pytest.approx(scores[1]["models"][1]["loss"], rel=1e-5)


def test_what_is_not_tied_is_still_missing(command: Command) -> None:
    said = command("eval", "a.safetensors", "--arch", "nets.py:gpt?tied=false", "--data", "data.py:text", status=1)
    assert "Missing in the file: lm_head.weight" in said
    state = _state("a.safetensors")
    save_file({name: value for name, value in state.items() if name != _EMBEDDING}, "neither.safetensors")
    said = command("eval", "neither.safetensors", *_ON, "--data", "data.py:text", status=1)
    assert f"Missing in the file: {_EMBEDDING}, {_HEAD}" in said


def test_what_may_be_weights_is_never_left_out(command: Command) -> None:
    more = {"transformer.h.1.ln.weight": torch.ones(16), _MASK: torch.ones(1, 1, 8, 8).tril()}
    save_file({**_state("a.safetensors"), **more}, "more.safetensors")
    said = command("eval", "more.safetensors", *_ON, "--data", "data.py:text", status=1)
    assert "Not in the architecture: " in said
    assert "transformer.h.1.ln.weight" in said


def test_constants_are_told(command: Command) -> None:
    said = command("eval", "a-old.safetensors", *_ON, "--data", "data.py:text")
    assert "not in the architecture, and no weights" in said
    assert f"'{_MASK}' (a mask)" in said
    assert "'transformer.h.0.attn.masked_bias' (a single whole number)" in said


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (torch.arange(6)[None], "whole numbers"),
        (torch.ones(3, 3, dtype=torch.bool), "whole numbers"),
        (torch.arange(6.0)[None], "positions"),
        (torch.ones(1, 1, 4, 4).tril(), "a mask"),
        (torch.ones(4, 4).triu(1), "a mask"),
        (torch.tensor(-1e4), "a single whole number"),
        (torch.tensor(-float("inf")), "a single whole number"),
        (10_000 ** -(torch.arange(0, 16, 2) / 16), "frequencies"),
        (torch.tensor(2.6593), None),
        (torch.tensor(float("nan")), None),
        (torch.ones(4), None),
        (torch.zeros(4), None),
        (torch.eye(4), None),
        (torch.randn(4, 4, generator=torch.Generator().manual_seed(0)), None),
        (torch.rand(5, generator=torch.Generator().manual_seed(0)).sort(descending=True).values, None),
        (torch.ones(2, 2, dtype=torch.complex64).tril(), None),
    ],
)
def test_only_what_cannot_be_trained_is_a_constant(tensor: Tensor, kind: str | None) -> None:
    assert constant_kind(tensor) == kind


@pytest.mark.parametrize("held", ["first.weight", "second.weight", "third.weight"])
def test_sources_in_python_may_hold_one_of_several_tied_names(command: Command, held: str) -> None:
    space: dict[str, type[nn.Module]] = {}
    exec(_FILES["nets.py"], space)
    nets = []
    for seed in range(2):
        torch.manual_seed(seed)
        nets.append(space["Thrice"]())
    kept = []
    for net in nets:
        state = net.state_dict()
        kept.append({name: state[name] for name in (held, "hidden.weight", "back.weight")})
    sources = [SourceModel(f"net {k}", space["Thrice"], state) for k, state in enumerate(kept)]
    inputs = torch.randn(4, 5)
    for solver in ("wb", "average"):
        fused = fuse(sources, solver=solver, example_inputs=inputs, device="cpu").state
        wanted = fuse(nets, solver=solver, example_inputs=inputs, device="cpu").state
        assert fused.keys() == wanted.keys()
        assert all(torch.equal(fused[name], wanted[name]) for name in wanted)
    del kept[0][held]
    with pytest.raises(ArchitectureError, match=r"'first.weight' is missing"):
        fuse([SourceModel("bad", space["Thrice"], kept[0])] * 2, solver="wb", example_inputs=inputs)
