"""Operations between two layers: several in one net keep the function, others say why they hold neurons in place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_ot import check_model, trace_model


class Between(nn.Module):
    """Functions of six neurons, added up between two linear layers."""

    def __init__(self, *functions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.functions = nn.Linear(3, 6), nn.Linear(6, 2), functions

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        return self.last(sum(function(hidden) for function in self.functions))


def bounds(like: Tensor) -> Tensor:
    return torch.tensor([-1.0, 0.0, 1.0], dtype=like.dtype)


def gram(h: Tensor) -> Tensor:
    return h.T @ h / 8


FREE = {
    "order statistics without their places": (
        lambda h: h * h.max(1, keepdim=True)[0],
        lambda h: h * h.median(1, keepdim=True)[0],
        lambda h: h * h.kthvalue(2, 1, keepdim=True)[0],
        lambda h: h * h.sort(1)[0][:, 1:2],
        lambda h: h * h.topk(2, 1)[0].sum(1, keepdim=True),
        lambda h: torch.take_along_dim(h, h.argsort(0), 0),
    ),
    "distances": (
        lambda h: torch.cdist(h, h) @ h,
        lambda h: h * F.pdist(h).sum(),
        lambda h: h * F.cosine_similarity(h, h * h + 1, dim=1)[:, None],
        lambda h: h * F.pairwise_distance(h, h * h)[:, None],
        lambda h: h * torch.linalg.vecdot(h, h * 2)[:, None],
        lambda h: torch.inner(h, h) @ h,
        lambda h: h * torch.dist(h, h * h),
    ),
    "norms and moments": (
        lambda h: h * h.nansum(1, keepdim=True),
        lambda h: h - torch.var_mean(h, 1, keepdim=True)[1],
        lambda h: h / (1 + torch.linalg.norm(h, dim=1, keepdim=True)),
        lambda h: h / (1 + torch.linalg.matrix_norm(h)),
        lambda h: h - torch.aminmax(h, dim=1, keepdim=True)[0],
        lambda h: torch.renorm(h, 2, 0, 0.5),
        lambda h: h * torch.histc(h, 5, -3, 3)[2],
    ),
    "matrices of neurons": (
        lambda h: gram(h).diagonal() * h,
        lambda h: torch.trace(gram(h)) * h,
        lambda h: h @ torch.diag(h.mean(0)),
        lambda h: h @ torch.linalg.inv(gram(h) + torch.diag_embed(h.exp().mean(0) + 1)),
        lambda h: torch.linalg.solve(gram(h) + torch.diag(h.exp().mean(0) + 1), h.T).T,
        lambda h: h @ torch.matrix_exp(gram(h)),
        lambda h: torch.linalg.multi_dot([h, h.T, h]),
    ),
    "other types and complex parts": (
        lambda h: h.type_as(h.mean()),
        lambda h: h.to(h.mean()),
        lambda h: torch.view_as_real(torch.complex(h, h * h) * torch.complex(h, h)).sum(-1),
        lambda h: torch.polar(h.abs(), h).real,
        lambda h: torch.view_as_complex(torch.stack([h, h * h], -1)).abs(),
        lambda h: torch.fft.fft(h, dim=0).abs(),
        lambda h: h * torch.bucketize(h, bounds(h)),
        lambda h: h * torch.searchsorted(bounds(h), h),
    ),
    "shapes": (
        lambda h: torch.hstack([h, h])[:, :6],
        lambda h: torch.vstack([h, h])[: h.shape[0]],
        lambda h: h.swapaxes(0, 1).mT,
        lambda h: torch.broadcast_tensors(h, h.mean(1, keepdim=True))[0] * 2,
        lambda h: sum(torch.meshgrid(h.mean(0), h.mean(0) ** 2, indexing="ij")).mean(1) * h,  # type: ignore[union-attr]
        lambda h: torch.diff(h, dim=0, prepend=h[:1]),
        lambda h: h.cummax(0)[0],
        lambda h: h * F.mse_loss(h, h * h),
        lambda h: F.logsigmoid(h) + torch.subtract(h, 1) + torch.divide(h, 2),
        lambda h: F.dropout(h, 0.5, training=False),
    ),
}


SLOWER = ("matrices of neurons", "shapes", "distances")
CHOSEN = [pytest.param(name, marks=pytest.mark.slow) if name in SLOWER else name for name in FREE]


@pytest.mark.parametrize("name", CHOSEN)
def test_operations_that_the_order_does_not_matter_to_leave_it_free(name: str) -> None:
    report = check_model(lambda: Between(*FREE[name]), torch.randn(4, 3), trials=1)
    assert (report.groups, report.certified, report.preserved) == (1, 1, True), report.pins
    assert report.culprits == ()
    assert not report.graph.diagnostics.unknown_operations


PINNED = {
    "an index into this axis": lambda h: h * h.max(1, keepdim=True)[1],
    "sorted along this axis": lambda h: h * h.topk(2, 1)[1].sum(1, keepdim=True),
    "random numbers are drawn per neuron": lambda h: F.dropout(h, 0.5),
    "computed in order along this axis": lambda h: h.cummax(1)[0],
    "a triangle is kept": lambda h: h @ gram(h).tril(),
    "a matrix decomposition": lambda h: h * torch.linalg.det(gram(h)),
    "entries are filled in the order of their places": lambda h: h.masked_scatter(h > 0, h * 2),
    "Fourier transform along this axis": lambda h: torch.fft.fft(h).abs(),
}


@pytest.mark.parametrize("name", FREE)
def test_every_operation_has_a_rule_that_fits(name: str) -> None:
    graph = trace_model(Between(*FREE[name]), torch.randn(4, 3))
    assert list(graph.free_groups) == ["first.weight:0"]
    assert not graph.diagnostics.sentences


@pytest.mark.parametrize("reason", PINNED)
def test_operations_that_the_order_matters_to_say_why(reason: str) -> None:
    graph = trace_model(Between(PINNED[reason]), torch.randn(4, 3))
    assert not graph.free_groups
    assert any(reason in sentence for sentence in graph.pin_sentences())
    assert not graph.diagnostics.unknown_operations


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised, as networks without normalisation do it."""

    def forward(self, inputs: Tensor) -> Tensor:
        rows = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(rows, None, None, training=True, momentum=0.0).reshape_as(self.weight)
        return F.conv2d(inputs, weight, self.bias)


def without_statistics() -> nn.Module:
    norms = [nn.BatchNorm2d(6, track_running_stats=False), nn.BatchNorm2d(5, affine=False, track_running_stats=False)]
    rest = [nn.ReLU(), nn.Flatten(), nn.Linear(20, 2)]
    return nn.Sequential(Standardised(2, 6, 3), norms[0], nn.ReLU(), Standardised(6, 5, 3), norms[1], *rest)


def test_batch_statistics_and_standardised_weights_leave_channels_free() -> None:
    report = check_model(without_statistics, torch.randn(2, 2, 6, 6), trials=1)
    assert (report.groups, report.certified, report.preserved) == (2, 2, True), report.pins
    assert not report.warnings
