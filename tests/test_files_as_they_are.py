"""Which weights in a file are taken: found where one way fits, asked for by name where several do."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import commands
from file_kinds import NETS, ON, make_net, state_of
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from mergekit_ot import load_checkpoint
from mergekit_ot.storage.renaming import RenamedStore, renamings
from mergekit_ot.storage.store import MemoryStore

Command = Callable[..., str]
State = dict[str, Tensor]
_NAMES = st.lists(st.sampled_from(["a", "b", "stem", "model", "0", "1"]), min_size=1, max_size=3).map(".".join)
_EXPECTED = st.sets(_NAMES.map(lambda name: f"{name}.weight"), min_size=1, max_size=6)
_PREFIXES = st.sampled_from(["", "model.", "net.model.", "a.", "ema_", "x/"])


@pytest.fixture
def command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Gives a way to run commands in a folder of networks; returns what they print on standard error."""
    monkeypatch.chdir(tmp_path)
    Path("nets.py").write_text(NETS, encoding="utf-8")

    ran = commands(capsys)

    def unfolded(*arguments: str, status: int = 0) -> str:
        printed = ran(*arguments, status=status)
        return printed if "--json" in arguments else " ".join(printed.split())

    return unfolded


def _tensors(names: set[str]) -> State:
    return {name: torch.tensor([float(place)]) for place, name in enumerate(sorted(names))}


@given(_EXPECTED, _PREFIXES, st.sampled_from(["", "_orig_mod", "module"]), st.data())
def test_names_behind_a_prefix_are_found(expected: set[str], prefix: str, wrapper: str, data: st.DataObject) -> None:
    """Whatever stands before the names, and whatever wraps a part of the network, the same tensors are found."""
    wrapped = data.draw(st.sampled_from(sorted({name.split(".")[0] for name in expected}))) if wrapper else ""
    held = {name: prefix + (f"{wrapped}.{wrapper}{name[len(wrapped):]}" if wrapped and name.startswith(f"{wrapped}.")
                            else name) for name in expected}  # fmt: skip
    state = _tensors(expected)
    store = MemoryStore({held[name]: tensor for name, tensor in state.items()} | {"steps": torch.tensor(3)})
    ways = renamings(store.names, state, {})
    assert any(dict(RenamedStore(store, way.held)) == state for way in ways)
    for way in ways:
        assert way.held.keys() == state.keys()
        assert set(way.held.values()) <= set(store.names)


@given(_EXPECTED, _EXPECTED)
def test_no_way_is_found_where_a_name_is_missing(expected: set[str], others: set[str]) -> None:
    names = {f"p.{name}" for name in others}
    for way in renamings(names, _tensors(expected), {}):
        assert set(way.held.values()) <= names
        assert way.held.keys() == expected


def test_tied_names_are_found_behind_a_prefix() -> None:
    ties = dict.fromkeys(("head.weight", "embedding.weight"), ("head.weight", "embedding.weight"))
    ways = renamings(["model.embedding.weight", "model.norm"], _tensors({*ties, "norm"}), ties)
    assert [way.prefix for way in ways] == ["model."]


def _save(content: Callable[[int], object], end: str = ".pt") -> tuple[str, str]:
    for seed, name in enumerate("ab"):
        torch.save(content(seed), f"{name}{end}")
    return f"a{end}", f"b{end}"


_FUSE = ("-o", "out.pt", *ON)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: {"A2B": state_of(s), "B2A": state_of(s + 5)}, "holds 2 state dicts that fit the architecture: "
         "'A2B', 'B2A'. Say which one is meant, such as --state-key A2B."),
        (lambda s: {"model": state_of(s), "net": state_of(s + 5)}, "2 state dicts that fit the architecture: 'model'"),
        (lambda s: {f"{p}.{n}": t for p in ("q", "k") for n, t in state_of(s).items()}, "holds 2 whole copies of "
         "architecture 'nets.py:net', whose names begin with 'q.', 'k.'. Say which one is meant, such as "
         "--strip-prefix q."),
        (lambda s: {"head.weight": torch.randn(2, 3), **{f"m.{n}": t for n, t in state_of(s).items()}},
         "which fits otherwise (the prefix 'm.' taken off the names). Not in the architecture: head.weight. If they "
         "are no part of the network, leave them as they are with --ignore 'head.*'"),
        (lambda s: {**state_of(s), "extra.weight": torch.randn(3)}, "leave them as they are with --ignore 'extra.*'"),
        (lambda s: nn.Conv2d(3, 3, 3).state_dict(), "No name in the file is one of the architecture: check --arch"),
        (lambda s: {f"m.{n}": t for n, t in make_net(7).state_dict().items()},
         "(the prefix 'm.' taken off the names): '0.weight' is 7×4 in the file and 6×4 in the architecture."),
        (lambda s: [torch.ones(3), torch.ones(2)], "Its 2 tensor(s) have no names"),
        (lambda s: {"base_model.model.0.lora_A.weight": torch.ones(2, 4), "base_model.model.0.lora_B.weight":
         torch.ones(6, 2)}, "holds an adapter ('base_model.model.0.lora_A.weight' and 1 more such tensors): factors"),
    ],
)  # fmt: skip
def test_what_is_asked_for_is_named(command: Command, content: Callable[[int], object], message: str) -> None:
    names = _save(content)
    said = command("fuse", *names, *_FUSE, status=1)
    assert message in said
    assert not Path("out.pt").exists()


def test_the_network_that_fits_is_taken(command: Command) -> None:
    def pair(seed: int) -> dict[str, object]:
        torch.manual_seed(seed)
        judge = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)).state_dict()
        return {"maker": state_of(seed), "judge": judge}

    names = _save(pair)
    said = command(
        "fuse", *names, "-o", "f.pt", "--input-shape", "2", "--arch", "nets.py:judge", "--model-weights", "1,0"
    )
    assert "a.pt: the state under 'judge' is taken, which is the one that fits" in said
    fused, source = torch.load("f.pt"), torch.load("a.pt")
    assert all(torch.equal(fused["judge"][name], tensor) for name, tensor in source["judge"].items())
    assert all(torch.equal(fused["maker"][name], tensor) for name, tensor in source["maker"].items())


def test_every_command_takes_the_choices(command: Command) -> None:
    def content(seed: int) -> dict[str, object]:
        twin = {f"x.{name}": tensor for name, tensor in state_of(seed + 5).items()}
        return {
            "A": state_of(seed + 9),
            "B": {**{f"y.{n}": t for n, t in state_of(seed).items()}, **twin, "z": torch.ones(3)},
        }

    names = _save(content)
    np.savez("d.npz", x=np.ones((4, 4), np.float32), y=np.zeros(4, np.int64))
    torch.save(state_of(0), "plain.pt")
    on = ("--arch", "nets.py:net", "--state-key", "B", "--strip-prefix", "y.", "--ignore", "z")
    scores = json.loads(command("eval", "a.pt", "plain.pt", "--data", "d.npz", *on, "--json"))["models"]
    assert scores[0]["loss"] == scores[1]["loss"]
    for arguments in (("check", "a.pt"), ("inspect", "a.pt"), ("align", *names, "-o", "aligned")):
        assert "the prefix 'y.' taken off" in command(*arguments, *on, "--input-shape", "4")
    assert "the prefix 'y.' taken off" in command("barrier", *names, "--data", "d.npz", "--points", "2", *on)
    recipe = {"models": list(names), "arch": ["nets.py:net"], "state_key": "B", "strip_prefix": "y", "ignore": "z"}
    Path("r.yaml").write_text(json.dumps({**recipe, "input_shape": [4], "model_weights": [1.0, 0.0]}))
    command("fuse", "--recipe", "r.yaml", "-o", "f.pt")
    fused = torch.load("f.pt")
    assert torch.equal(fused["B"]["y.0.weight"], state_of(0)["0.weight"])
    assert torch.equal(fused["B"]["z"], torch.ones(3))
    assert not any(name.startswith("x.") for name in fused["B"])


def test_a_prefix_that_no_name_has_is_told(command: Command) -> None:
    names = _save(lambda seed: {f"m.{name}": tensor for name, tensor in state_of(seed).items()})
    assert "No name in it begins with 'q.': check --strip-prefix" in command(
        "fuse", *names, *_FUSE, "--strip-prefix", "q.", status=1
    )
    command("fuse", *names, *_FUSE, "--strip-prefix", "m")


def test_factors_inside_of_a_whole_network_are_fused_with_a_warning(command: Command) -> None:
    Path("lora.py").write_text(
        "from torch import nn\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.lora_A = nn.Linear(4, 3, bias=False)\n"
        "        self.lora_B = nn.Linear(3, 2, bias=False)\n\n"
        "    def forward(self, x):\n        return self.lora_B(self.lora_A(x))\n",
        encoding="utf-8",
    )
    for name in "ab":
        torch.save({"lora_A.weight": torch.randn(3, 4), "lora_B.weight": torch.randn(2, 3)}, f"{name}.pt")
    said = command("fuse", "a.pt", "b.pt", "-o", "f.pt", "--arch", "lora.py:Net", "--input-shape", "4")
    assert "warning: a.pt holds factors of adapters, such as 'lora_A.weight'" in said


def test_an_adapter_folder_is_refused_with_the_way_out(command: Command) -> None:
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text("{}")
    save_file({"base_model.model.0.lora_A.weight": torch.ones(2)}, "adapter/adapter_model.safetensors")
    assert "merge_and_unload" in command("fuse", "adapter", "adapter", *_FUSE, status=1)


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation_is_called_so(command: Command) -> None:
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(make_net()), {nn.Linear}).state_dict()
    names = _save(lambda seed: quantised)
    assert "_packed_params' in 'a.pt' is a quantised tensor, which cannot be fused. Dequantise" in command(
        "fuse", *names, *_FUSE, status=1
    )


def test_arrays_in_any_order_of_bytes_are_the_same_numbers(tmp_path: Path) -> None:
    array = np.arange(12.0, dtype=np.float64).reshape(3, 4)
    content = {"plain": array, "swapped": array.astype(">f8"), "turned": np.asfortranarray(array), "one": array[:1, :0]}
    torch.save(content, tmp_path / "a.pt")
    state = load_checkpoint(tmp_path / "a.pt").state
    for name in ("plain", "swapped", "turned"):
        assert state[name].tolist() == array.tolist()
    assert state["one"].shape == (1, 0)
