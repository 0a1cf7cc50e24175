"""Weight matching beside git-re-basin-pytorch: CPU time and the sum of squared distances after alignment.

Set ``MERGEOT_PEERS`` to a folder that holds a checkout named ``git-re-basin-pytorch``; without it this is skipped. Run
with ``pytest tests/benchmarks/test_matching.py --benchmark-enable --benchmark-only -s``: both arms run in turn.
"""

import contextlib
import importlib
import io
import os
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
from networks import mnist_mlp, resnet18, vgg16
from orders import axes_of, objective

from mergekit_ot import FusionInputs, FusionOptions, trace_model
from mergekit_ot.fusion.engine import FusionRun
from mergekit_ot.fusion.sweeps import AlignmentRun, Material
from mergekit_ot.hooks.manager import default_manager
from mergekit_ot.hooks.preparing import prepare

PEER = Path(os.environ.get("MERGEOT_PEERS", "")) / "git-re-basin-pytorch"
SEEDS = range(5)


NETWORKS = {
    "mlp": (mnist_mlp, (2, 1, 28, 28)),
    "resnet18": (resnet18, (2, 3, 64, 64)),
    "vgg16": (vgg16, (2, 3, 32, 32)),
}


@pytest.mark.skipif(not PEER.is_dir(), reason="MERGEOT_PEERS names no folder with git-re-basin-pytorch")
@pytest.mark.parametrize("name", NETWORKS)
def test_weight_matching_beside_its_peer(benchmark, name: str) -> None:
    sys.path.insert(0, str(PEER))
    peer = importlib.import_module("utils.weight_matching")
    make, shape = NETWORKS[name]
    ratios, left = [], []
    for seed in SEEDS:
        models = []
        for number in range(2):
            torch.manual_seed(1000 * seed + number)
            models.append(make().eval())
        states = [{key: value.detach() for key, value in model.state_dict().items()} for model in models]
        inputs = FusionInputs(models, example_inputs=torch.randn(shape))
        options = FusionOptions(solver="weight-matching", seed=seed, device="cpu")
        setup = prepare(inputs, options, default_manager(), trace_model)
        axes = axes_of(setup.models.target_graph)
        torch.manual_seed(seed)
        start = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            theirs = peer.weight_matching(peer.permutation_spec_from_axes_to_perm(axes), *states)
        middle = time.process_time()
        run = FusionRun(setup)
        material = Material(run.tensors)
        found = AlignmentRun(
            setup, setup.methods.solver, run.plan, material, run.alignment, seed, lambda *_: None
        ).run()
        ratios.append((time.process_time() - middle) / (middle - start))
        ours = {key: found.coupling(key, 1).partners() for key in found.couplings}
        left.append((objective(states, axes, ours), objective(states, axes, theirs)))
    benchmark.pedantic(lambda: None)
    benchmark.extra_info["ratio"] = round(statistics.median(ratios), 2)
    print(name, [round(ratio, 2) for ratio in ratios], [(round(one, 2), round(other, 2)) for one, other in left])
    assert all(one <= other for one, other in left)
