"""How far `refit` is from its floor: what no regression of every layer can do without.

The floor is the forward of both sources and of the fused network, one Gram matrix and one Cholesky factor in double
precision per layer of the fused network. Run with ``pytest tests/benchmarks/test_refit.py --benchmark-enable
--benchmark-only -n0 -s``: prints how many times its floor the repair takes, in time of the processor on one thread, the
two measured in turn. The row of the floor carries it as ``ratio``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import pytest
import torch
from mergeot_repair.refit.refit import RefitRepair
from mergeot_repair.refit.regression import Sums
from mergeot_repair.refit.wide import KeptSamples
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional

from mergekit_ot import fuse, resolve_architecture

_INPUTS, _BATCH, _ROUNDS = 1_000, 100, 5
# As many places as refit takes at most: so many per input of a layer, and so many at least.
_PER_INPUT, _LEAST = 60, 20_000


def networks(name: str) -> list[nn.Module]:
    """Returns two networks of width 16, which is a quarter of VGG11's and all of ResNet-20's."""
    made = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        net = resolve_architecture(name, arguments={"width": 16})().train()
        with torch.no_grad():
            # Statistics of the data, as trained networks have them.
            for _ in range(20):
                net(torch.randn(20, 3, 32, 32))
        made.append(net.eval())
    return made


def layer_inputs(model: nn.Module, images: Tensor) -> list[Tensor]:
    """Returns what each layer reads, a row per place, as many rows as are fitted to."""
    rows: list[Tensor] = []

    def keep(module: nn.Module, read: tuple[Tensor, ...]) -> None:
        values = read[0]
        if isinstance(module, nn.Conv2d):
            padding = module.padding if isinstance(module.padding, tuple) else 0
            places = functional.unfold(values, module.kernel_size, padding=padding, stride=module.stride)
            values = places.transpose(1, 2).flatten(0, 1)
        rows.append(values[: max(_LEAST, _PER_INPUT * values.shape[1])].clone())

    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    handles = [layer.register_forward_pre_hook(keep) for layer in layers]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return rows


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Lets torch use one thread: several would wait for each other in the time that is measured."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def seconds(work: Callable[[], object]) -> float:
    """Returns the time of the processor that work takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


@pytest.mark.parametrize("name", ["vgg11", "resnet20"])
def test_refit(benchmark: BenchmarkFixture, one_thread: None, name: str) -> None:
    nets = networks(name)
    images = torch.randn(_INPUTS, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    batches = list(images.split(_BATCH))
    result = fuse(nets, solver="wb", example_inputs=batches[0], device="cpu")
    context = result.repair_context(result.state, (0.5, 0.5), [(batch,) for batch in batches])
    fused, read = result.model(), layer_inputs(nets[0], images)

    def floor() -> None:
        with torch.no_grad():
            for batch in batches:
                for net in (*nets, fused):
                    net(batch)
        for rows in read:
            gram = (rows.T @ rows).double()
            gram.diagonal().add_(1e-3 * gram.diagonal().mean())
            torch.linalg.cholesky(gram)

    def repair() -> None:
        RefitRepair().repair(context)

    floors, repairs = [], []
    for _ in range(_ROUNDS):
        floors.append(seconds(floor))
        repairs.append(seconds(repair))
    benchmark.group = "refit"
    benchmark.pedantic(floor, rounds=1)
    ratio = statistics.median(repairs) / statistics.median(floors)
    benchmark.extra_info["ratio"] = round(ratio, 2)
    print(f"refit of {name}: {ratio:.2f} times its floor of {statistics.median(floors):.2f} s")
    assert ratio > 1


def test_kept_samples(benchmark: BenchmarkFixture, one_thread: None) -> None:
    """A map with more inputs than samples: from products of the samples, beside those of the inputs."""
    generator = torch.Generator().manual_seed(0)
    read = torch.randn(1_000, 3_000, generator=generator)
    made, start = torch.randn(1_000, 50, generator=generator), torch.zeros(50, 3_000)

    def solved(sums: Sums | KeptSamples) -> Tensor:
        for inputs, targets in zip(read.split(100), made.split(100), strict=True):
            sums.add(inputs, targets)
        return sums.solve(start, has_shift=True).weight

    kept, whole = [], []
    for _ in range(_ROUNDS):
        kept.append(seconds(lambda: solved(KeptSamples())))
        whole.append(seconds(lambda: solved(Sums(3_000, 50))))
    benchmark.group = "refit of a wide map"
    benchmark.pedantic(lambda: solved(KeptSamples()), rounds=1)
    share = statistics.median(kept) / statistics.median(whole)
    benchmark.extra_info["share"] = round(share, 3)
    print(f"kept samples: {share:.3f} of the time of a Gram matrix")
    assert share < 1
