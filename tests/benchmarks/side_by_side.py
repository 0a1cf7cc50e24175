"""Prints one table: what users would take instead, beside what they get here, from the same weights in one run.

Run ``PYTHONPATH=tests MERGEOT_PEERS=folder python tests/benchmarks/side_by_side.py [CONTEST …]``; `peers` says what the
folder holds.
CPU time of one thread, all arms in turn, median of five; memory is what a process of its own grows by.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import ot
import torch
from contests import OURS, Contest, Row, held, table
from mergeot_gromov.solver import GromovBarycenterSolver
from mergeot_wasserstein.solver import WassersteinBarycenterSolver
from networks import mnist_mlp, resnet18
from orders import axes_of, objective
from peers import MissingPeerError, module, program, quiet
from planted import planted_permutation
from safetensors.torch import load_file
from test_gromov_against_pot import METHODS, Pair, by_us, permutation_near
from torch import Tensor, nn

from mergekit_ot import BarycenterProblem, FusionInputs, FusionOptions, NeuronMeasure, fuse, trace_model
from mergekit_ot.fusion.engine import FusionRun
from mergekit_ot.fusion.setup import FusionSetup
from mergekit_ot.hooks.manager import default_manager
from mergekit_ot.hooks.preparing import prepare

IMAGES, PHOTOS = torch.randn(2, 1, 28, 28), torch.randn(2, 3, 64, 64)
# A decoder of about 100 MiB in half precision.
LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 2752,
    "num_hidden_layers": 4,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 1000,
}
ARCHITECTURE = f"""
from transformers import LlamaConfig, LlamaForCausalLM

def llama():
    return LlamaForCausalLM(LlamaConfig(**{LLAMA!r}))
"""


def two(make: Callable[[], nn.Module], seed: int = 0) -> list[nn.Module]:
    """Returns two networks of other seeds."""
    models = []
    for number in range(2):
        torch.manual_seed(1000 * seed + number)
        models.append(make().eval())
    return models


def setup_of(models: list[nn.Module], inputs: Tensor, solver: str) -> FusionSetup:
    options = FusionOptions(solver=solver, device="cpu", threads=1)
    return prepare(FusionInputs(models, example_inputs=inputs), options, default_manager(), trace_model)


def barycenter() -> Contest:
    """POT's barycenter of three measures."""
    generator = torch.Generator().manual_seed(0)
    supports = [torch.randn(128, 64, generator=generator, dtype=torch.float64) for _ in range(3)]
    measures = tuple(NeuronMeasure.uniform(support) for support in supports)
    problem = BarycenterProblem(measures, (1 / 3, 1 / 3, 1 / 3), 128)
    arrays, mass = [support.numpy() for support in supports], np.full(128, 1 / 128)

    def pot() -> float:
        found = ot.lp.free_support_barycenter(arrays, [mass] * 3, arrays[0].copy(), b=mass)
        return sum(ot.emd2(mass, mass, ot.dist(found, each)) for each in arrays) / 3

    return Contest(
        "barycenter of 3 measures, 128 neurons, 64 numbers",
        {OURS: lambda: WassersteinBarycenterSolver().solve(problem).cost, "POT free_support_barycenter": pot},
        lambda cost: f"cost {cost[OURS]:.4f} / {cost['POT free_support_barycenter']:.4f}",
    )


def gromov_barycenter() -> Contest:
    """POT's Gromov-Wasserstein barycenter of three structures."""
    problems = [planted_permutation(64, 0.3, 0, seed)[0] for seed in range(2)]
    measures = (*problems[0].measures, problems[1].measures[0])
    problem = BarycenterProblem(measures, (1 / 3, 1 / 3, 1 / 3), 64)
    matrices = [measure.structure[0].double().numpy() * 8.0 for measure in measures]
    mass = np.full(64, 1 / 64)

    def cost(found: np.ndarray) -> float:
        """The mean distance of a matrix from all three, by POT's own coupling."""
        pairs = (ot.gromov.gromov_wasserstein2(found, each, mass, mass, symmetric=False) for each in matrices)
        return float(sum(pairs)) / 3

    def pot() -> np.ndarray:
        return np.asarray(ot.gromov.gromov_barycenters(64, matrices, [mass] * 3, mass, [1 / 3] * 3, symmetric=False))

    def ours() -> np.ndarray:
        solved = GromovBarycenterSolver(alpha=1.0).solve(problem)
        return solved.measure.structure[0].double().numpy() * 8.0

    return Contest(
        "Gromov-Wasserstein barycenter of 3 structures, 64 neurons",
        {OURS: ours, "POT gromov_barycenters": pot},
        lambda found: f"distance {' / '.join(f'{cost(each):.2f}' for each in found.values())}",
    )


def gromov_coupling() -> Contest:
    """POT's couplings of a planted order."""
    problem, planted = planted_permutation(256, 1.25, 0, 0)
    pair = Pair(problem, planted.index.numpy())
    arms = {OURS: by_us, **{name: METHODS[name] for name in ("POT, BAPG", "POT, conditional gradient")}}

    def outcome(plans: Mapping[str, np.ndarray]) -> str:
        hits = [bool((permutation_near(plan)[0] == pair.order).all()) for plan in plans.values()]
        return "planted order found: " + " / ".join("yes" if hit else "no" for hit in hits)

    return Contest(
        "Gromov-Wasserstein coupling of W_hh, 256 neurons, noise 1.25",
        {name: lambda method=method: method(pair) for name, method in arms.items()},
        outcome,
    )


def matching(work: str, make: Callable[[], nn.Module], inputs: Tensor) -> Contest:
    """git-re-basin-pytorch's weight matching, and rebasin's."""
    models = two(make)
    states = [{key: value.detach() for key, value in model.state_dict().items()} for model in models]
    axes = axes_of(setup_of(models, inputs, "weight-matching").models.target_graph)
    peer = module("git-re-basin-pytorch", "utils.weight_matching")

    def ours() -> dict[str, Tensor]:
        run = FusionRun(setup_of(models, inputs, "weight-matching"))
        run.run()
        return {key: run.alignment.coupling(key, 1).partners() for key in run.alignment.couplings}

    def theirs() -> dict[str, Tensor]:
        with quiet():
            return peer.weight_matching(peer.permutation_spec_from_axes_to_perm(axes), *states)

    return Contest(
        work,
        {OURS: ours, "git-re-basin-pytorch weight_matching": theirs},
        lambda found: f"apart {' / '.join(f'{objective(states, axes, each):.1f}' for each in found.values())}",
    )


def rebasin() -> Contest:
    """The package rebasin, from two modules to two aligned modules."""
    peer, models = module("site", "rebasin"), two(resnet18)

    def theirs() -> float:
        first, second = two(resnet18)
        with quiet():
            peer.PermutationCoordinateDescent(first, second, PHOTOS).rebasin()
        return apart(first.state_dict(), second.state_dict())

    def ours() -> float:
        result = fuse(models, solver="weight-matching", example_inputs=PHOTOS, device="cpu", threads=1)
        return apart(models[0].state_dict(), result.aligned_state(1))

    def apart(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
        names = [name for name, value in first.items() if value.is_floating_point() and "running" not in name]
        return sum(float((first[name].double() - second[name].double()).square().sum()) for name in names)

    return Contest(
        "align ResNet-18, modules in, modules out",
        {OURS: ours, "rebasin": theirs},
        lambda found: f"apart {' / '.join(f'{each:.1f}' for each in found.values())}",
    )


def otfusion() -> Contest:
    """The routine of the authors of OTFusion for all layers of a network."""
    unused = ("routines", "model", "compute_activations", "train", "data", "vgg", "resnet", "partition", "parameters")
    peer, models = module("otfusion", "wasserstein_ensemble", unused), two(mnist_mlp)
    said: dict[str, Any] = {"gpu_id": -1, "exact": True, "correction": True, "proper_marginals": True}
    said |= {"past_correction": True, "ensemble_step": 0.5, "ground_metric": "euclidean", "reg": 0.01}
    said |= {"ground_metric_normalize": "none", "ground_metric_eff": True, "geom_ensemble_type": "wts"}
    unset = ("eval_aligned", "debug", "unbalanced", "dist_normalize", "activation_histograms")
    said |= dict.fromkeys((*unset, "normalize_wts", "clip_gm"), False) | {"importance": None}
    said |= {"not_squared": True, "skip_last_layer": True}

    def theirs() -> list[Tensor]:
        with quiet(), torch.no_grad():
            # The first of its networks is aligned with the second.
            return peer.get_wassersteinized_layers_modularized(SimpleNamespace(**said), models[::-1])

    def ours() -> list[Tensor]:
        run = FusionRun(setup_of(models, IMAGES, "otfusion"))
        run.run()
        return list(run.fused.values())

    return Contest(
        "OTFusion of an MLP 784-400-200-100-10",
        {OURS: ours, "OTFusion, layer routine alone": theirs},
        lambda found: f"largest difference {max(map(difference, *found.values())):.0e}",
    )


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def mergekit(method: str) -> Contest:
    """The command of mergekit, beside that of mergeot, on two checkpoints of one decoder."""
    command, folder = program("mergekit", "mergekit-yaml"), Path(tempfile.mkdtemp())
    scope: dict[str, Any] = {}
    exec(ARCHITECTURE, scope)
    (folder / "nets.py").write_text(ARCHITECTURE)
    for number in range(2):
        torch.manual_seed(number)
        model, place = scope["llama"]().to(torch.bfloat16), folder / f"m{number}"
        model.save_pretrained(place)
    models = [{"model": str(folder / f"m{number}"), "parameters": {"weight": 0.5}} for number in range(2)]
    recipe = {"merge_method": method, "dtype": "bfloat16", "models": models}
    if method == "slerp":
        recipe |= {"base_model": str(folder / "m0"), "parameters": {"t": 0.5}}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    files = [str(folder / f"m{number}" / "model.safetensors") for number in range(2)]
    fused = str(folder / "fused.safetensors")
    flags = ("--arch", f"{folder}/nets.py:llama", "--input-shape", "8", "--solver", "average", "--threads", "1")

    def ours() -> dict[str, Tensor]:
        run([sys.executable, "-c", "from mergekit_ot.cli.app import main; main()", "fuse", *files, *flags, "-o", fused])
        return load_file(fused)

    def theirs() -> dict[str, Tensor]:
        run([str(command), str(folder / "recipe.yaml"), str(folder / "merged")])
        parts = [load_file(path) for path in sorted((folder / "merged").glob("*.safetensors"))]
        return {name: value for part in parts for name, value in part.items()}

    def outcome(found: Mapping[str, dict[str, Tensor]]) -> str:
        one, other = found.values()
        shared = one.keys() & other.keys()
        return f"largest difference {max(difference(one[name].float(), other[name].float()) for name in shared):.0e}"

    size = Path(files[0]).stat().st_size >> 20
    return Contest(
        f"mean of two decoders of {size} MiB, whole commands", {OURS: ours, f"mergekit {method}": theirs}, outcome
    )


def run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True)


def pruning() -> Contest:
    """Torch-Pruning's groups of a network."""
    peer, model = module("site", "torch_pruning"), resnet18().eval()

    def theirs() -> int:
        with quiet():
            graph = peer.DependencyGraph().build_dependency(model, PHOTOS)
            return len(list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear])))

    return Contest(
        "groups of neurons of ResNet-18",
        {OURS: lambda: len(trace_model(model, PHOTOS).free_groups), "Torch-Pruning": theirs},
        lambda found: "groups " + " / ".join(map(str, found.values())),
    )


CONTESTS: Mapping[str, Callable[[], Contest]] = {
    "barycenter": barycenter,
    "gromov-barycenter": gromov_barycenter,
    "gromov-coupling": gromov_coupling,
    "matching-mlp": lambda: matching(
        "weight matching, MLP 784-400-200-100-10; ours traces and checks as well", mnist_mlp, IMAGES
    ),
    "matching-resnet18": lambda: matching(
        "weight matching, ResNet-18; ours traces and checks as well", resnet18, PHOTOS
    ),
    "rebasin": rebasin,
    "otfusion": otfusion,
    "mergekit-linear": lambda: mergekit("linear"),
    "mergekit-slerp": lambda: mergekit("slerp"),
    "torch-pruning": pruning,
}


def main(names: list[str]) -> None:
    """Holds the contests, all where none is named, and prints the table."""
    torch.set_num_threads(1)
    rows: list[Row] = []
    missing = []
    for name in names or CONTESTS:
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            rows += held(CONTESTS[name]())
        except MissingPeerError as error:
            missing.append(f"{name}: {error}")
    print(table(rows), *(f"Left out: {each}." for each in missing), sep="\n")


if __name__ == "__main__":
    main(sys.argv[1:])
