"""Kinds of files that people bring: how a state is written into each, and how those read it who use it."""

from __future__ import annotations

import argparse
import json
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

NETS = """
from torch import nn

def net(hidden=6):
    return nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 2))

def judge():
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
"""
ON = ("--input-shape", "4", "--arch", "nets.py:net")
State = dict[str, Tensor]


def make_net(hidden: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(4, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, 2))


def _judge() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))


def state_of(seed: int) -> OrderedDict[str, Tensor]:
    torch.manual_seed(seed)
    net = make_net()
    net(torch.randn(8, 4)).sum().backward()
    return OrderedDict((name, tensor.clone()) for name, tensor in net.state_dict().items())


def _behind(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def _optimizer() -> dict[str, Any]:
    net = make_net()
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(8, 4)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def _averaged(state: State) -> dict[str, Any]:
    net = make_net()
    net.load_state_dict(state)
    averaged = torch.optim.swa_utils.AveragedModel(net)
    averaged.update_parameters(net)
    return averaged.state_dict()


def _half(state: State) -> State:
    return {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def into_net(state: Any) -> State:
    net = make_net()
    if isinstance(state, dict) and any(tensor.dtype == torch.float16 for tensor in state.values()):
        net = net.half()
    net.load_state_dict(state)
    return net.state_dict()


def _into_average(state: Any) -> State:
    averaged = torch.optim.swa_utils.AveragedModel(make_net())
    averaged.load_state_dict(state)
    return {**averaged.module.state_dict(), "n_averaged": state["n_averaged"]}


def _arrays(state: State) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in state.items()}


def of_arrays(arrays: Any) -> State:
    pairs = zip(make_net().state_dict(), arrays, strict=True) if isinstance(arrays, list) else arrays.items()
    named = OrderedDict(pairs)
    assert all(isinstance(array, np.ndarray | np.generic) for array in named.values())
    return into_net(OrderedDict((name, torch.from_numpy(np.asarray(array))) for name, array in named.items()))


def _load(path: str, weights_only: bool = True) -> Any:
    return torch.load(path, weights_only=weights_only)


def _unpickled(path: str) -> Any:
    return pickle.loads(Path(path).read_bytes())


def _lightning(state: State) -> dict[str, Any]:
    return {
        "epoch": 3,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": _behind("model.", state) | {"model_loss.weight": torch.tensor([1.0, 0.3])},
        "optimizer_states": [_optimizer()],
        "lr_schedulers": [{"last_epoch": 3}],
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.1)}},
        "hyper_parameters": {"lr": 0.1, "widths": [6]},
    }


def _from_lightning(path: str) -> State:
    content = _load(path)
    assert content.keys() >= {"epoch", "pytorch-lightning_version", "hyper_parameters", "state_dict"}
    assert content["hyper_parameters"] == {"lr": 0.1, "widths": [6]}
    assert torch.equal(content["state_dict"].pop("model_loss.weight"), torch.tensor([1.0, 0.3]))
    return into_net({name.removeprefix("model."): tensor for name, tensor in content["state_dict"].items()})


def _from_voice(path: str) -> State:
    content = _load(path, weights_only=False)
    assert list(content) == ["weight", "config", "sr", "f0", "mean", "args", "score"]
    assert (content["config"], content["sr"], content["f0"]) == ([1, "x"], "40k", 1)
    assert torch.equal(content["mean"], torch.arange(3.0))
    assert content["args"] == argparse.Namespace(width=5, names=["a"])
    assert content["score"] == 0.5
    return into_net(content["weight"])


def _voice(state: State) -> dict[str, Any]:
    beside = {"config": [1, "x"], "sr": "40k", "f0": 1, "mean": torch.arange(3.0)}
    return {
        "weight": _half(state),
        **beside,
        "args": argparse.Namespace(width=5, names=["a"]),
        "score": np.float64(0.5),
    }


@dataclass(frozen=True)
class Kind:
    """A kind of file: how a state is written into it, how it is read by those who use it, and what is said."""

    name: str
    content: Callable[[State], Any]
    read: Callable[[str], State]
    flags: tuple[str, ...] = ()
    end: str = ".pt"
    dump: Callable[[Any, str], object] = torch.save
    says: tuple[str, ...] = ()


def _pickle(content: Any, path: str) -> None:
    Path(path).write_bytes(pickle.dumps(content))


def _npz(content: Any, path: str) -> None:
    np.savez(path, *content) if isinstance(content, list) else np.savez(path, **content)


KINDS = [
    Kind("plain", lambda s: s, lambda p: into_net(_load(p))),
    Kind("legacy", lambda s: s, lambda p: into_net(_load(p)), dump=lambda content, path: torch.save(
        content, path, _use_new_zipfile_serialization=False)),
    Kind("lightning", _lightning, _from_lightning, ("--ignore", "model_loss.*"), ".ckpt",
         says=("prefix 'model.'", "optimizer_states (state of the training)", "ignored): 'model_loss.weight'")),
    Kind("swa", _averaged, lambda p: _into_average(_load(p)), says=("prefix 'module.'", "'n_averaged' (a counter")),
    Kind("parallel", lambda s: _behind("module.", s), lambda p: into_net(
        {name.removeprefix("module."): tensor for name, tensor in _load(p).items()})),
    Kind("compiled", lambda s: _behind("_orig_mod.", s), lambda p: into_net(
        {name.removeprefix("_orig_mod."): tensor for name, tensor in _load(p).items()})),
    Kind("parallel inside", lambda s: {name.replace(".", ".module.", 1): tensor for name, tensor in s.items()},
         lambda p: into_net({name.replace(".module.", "."): tensor for name, tensor in _load(p).items()}),
         says=("'module.' taken off",)),
    Kind("profiled", lambda s: {**s, "total_ops": torch.tensor([12.5]), "0.total_params": torch.zeros(1)},
         lambda p: {**into_net({n: t for n, t in _load(p).items() if "total" not in n}),
                    **{n: t for n, t in _load(p).items() if "total" in n}}, says=("left by a profiler",)),
    Kind("average beside", lambda s: {"params": s, "params_ema": state_of(9)}, lambda p: into_net(_load(p)["params"]),
         says=("--state-key params_ema takes them", "params_ema (another copy")),
    Kind("average taken", lambda s: {"params": state_of(9), "params_ema": s}, lambda p: into_net(
        _load(p)["params_ema"]), ("--state-key", "params_ema"), says=("params (another copy",)),
    Kind("average inside", lambda s: {**_behind("online_model.", state_of(9)), **_behind("ema_model.", s),
                                      "step": torch.tensor(5)},
         lambda p: {"step": _load(p).pop("step"), **into_net(
             {n.removeprefix("ema_model."): t for n, t in _load(p).items() if n.startswith("ema")})},
         ("--strip-prefix", "ema_model."), says=("out of date",)),
    Kind("adversarial", lambda s: {"judge": _judge().state_dict(), "maker": s, "optimizer": _optimizer()},
         lambda p: into_net(_load(p)["maker"]), says=("kept beside the weights as they are: judge", "left out:")),
    Kind("voice", _voice, _from_voice, end=".pth", says=("kept beside the weights as they are: config, sr, f0",)),
    Kind("npz", _arrays, lambda p: of_arrays(dict(np.load(p))), end=".npz", dump=_npz, says=("archive of 9 NumPy",)),
    Kind("npz without names", lambda s: list(_arrays(s).values()), lambda p: of_arrays(
        [np.load(p)[f"arr_{place}"] for place in range(9)]), end=".npz", dump=_npz, says=("tensors without names",)),
    Kind("arrays by name", _arrays, lambda p: of_arrays(_load(p, weights_only=False)), says=("as NumPy arrays",)),
    Kind("list of arrays", lambda s: list(_arrays(s).values()), lambda p: of_arrays(_load(p, weights_only=False))),
    Kind("pickled list", lambda s: list(_arrays(s).values()), lambda p: of_arrays(_unpickled(p)), end=".pkl",
         dump=_pickle, says=("list of 9 tensors", "in the order of the architecture's state dict")),
    Kind("pickled client", lambda s: {"round": 3, "weights": _arrays(s)}, lambda p: of_arrays(
        _unpickled(p)["weights"]), end=".pkl", dump=_pickle, says=("beside it: round",)),
    Kind("safetensors", dict, lambda p: into_net(_tensors(p)), end=".safetensors",
         dump=lambda content, path: save_file(content, path, metadata={"format": "pt", "author": "me"})),
]  # fmt: skip


def _tensors(path: str) -> State:
    with safe_open(path, "pt") as file:
        assert file.metadata()["author"] == "me"
        assert json.loads(file.metadata()["mergekit_ot"])["provenance"]["solver"] == "wb"
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
