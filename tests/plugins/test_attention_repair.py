"""Laws of the repairs on transformers: packed and single projections of attention, LayerNorm before and after."""

from __future__ import annotations

import pytest
import torch
from signed import traced_once
from torch import Tensor, nn
from torch.nn import functional

from mergekit_ot import fuse

pytestmark = pytest.mark.usefixtures(traced_once.__name__)


class _Packed(nn.Module):
    """Two layers of `nn.TransformerEncoder`, whose queries, keys and values are one weight."""

    def __init__(self, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 32, 0.0, batch_first=True, norm_first=norm_first)
        self.embed = nn.Linear(6, 16)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)).mean(1))


class _Single(nn.Module):
    """One layer of attention with a weight for each of queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.out, self.head = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.query, self.key, self.value = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, tokens: Tensor) -> Tensor:
        stream = self.embed(tokens)
        heads = [part(stream).unflatten(-1, (4, 4)).transpose(1, 2) for part in (self.query, self.key, self.value)]
        mixed = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        return self.head((stream + self.out(mixed)).relu().mean(1))


def _net(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    net = _Single() if kind == "single" else _Packed(norm_first=kind == "norm first")
    for weight in net.parameters():
        if weight.ndim > 1:
            nn.init.normal_(weight, std=1.5 / weight.shape[1] ** 0.5)
    return net.eval()


def _tokens(count: int, seed: int) -> Tensor:
    return torch.randn(count, 7, 6, generator=torch.Generator().manual_seed(seed))


_KINDS = pytest.mark.parametrize("kind", ["single", "norm last", "norm first"])


@_KINDS
@pytest.mark.parametrize("repair", ["refit", "repair", "rescale"])
def test_a_transformer_fused_with_itself_stays(repair: str, kind: str) -> None:
    net, data = _net(kind, 0), _tokens(400, 3)
    fused = fuse([net, net], solver="wb", data=[data], calibration_size=400, repair=repair, device="cpu").model()
    with torch.no_grad():
        assert torch.allclose(fused(data), net(data), atol=1e-3)


@_KINDS
def test_refit_comes_nearer_to_the_mean_of_the_sources(kind: str) -> None:
    nets, data, held_out = [_net(kind, seed) for seed in (0, 1)], _tokens(600, 3), _tokens(200, 9)
    errors = []
    for repair in ("none", "refit"):
        fused = fuse(nets, solver="wb", data=[data], calibration_size=600, repair=repair, device="cpu").model()
        with torch.no_grad():
            goal = (nets[0](held_out) + nets[1](held_out)) / 2
            errors.append(float((fused(held_out) - goal).square().mean()))
    assert errors[1] < 0.5 * errors[0]
