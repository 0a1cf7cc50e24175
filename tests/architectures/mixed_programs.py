"""Networks that are hard to trace: experts, branches on data, writes in place, and NumPy in the middle."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.base import Sample, images, numbers


def _expert(width: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width))


class ExpertsLoop(nn.Module):
    """Experts as modules, each weighted by the gate."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 5)
        self.gate = nn.Linear(5, 3)
        self.experts = nn.ModuleList(_expert(5, hidden) for hidden in (7, 8, 9))
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.embed(x))
        weights = F.softmax(self.gate(x), dim=-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            y = y + weights[..., number : number + 1] * expert(x)
        return self.head(y)


class ExpertsStacked(nn.Module):
    """Experts along an axis of the weights, all read at once."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 5)
        self.gate = nn.Linear(5, 3)
        self.up = nn.Parameter(torch.randn(3, 8, 5) / 2)
        self.bias = nn.Parameter(torch.randn(3, 8))
        self.down = nn.Parameter(torch.randn(3, 7, 8) / 3)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.embed(x))
        hidden = F.gelu(torch.einsum("bi,ehi->beh", x, self.up) + self.bias)
        y = torch.einsum("beh,eoh->beo", hidden, self.down)
        return self.head(F.relu((y * self.gate(x).softmax(-1)[..., None]).sum(1)))


class ExpertsTopK(nn.Module):
    """Each row goes to the two experts that the gate likes best."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 5)
        self.gate = nn.Linear(5, 4, bias=False)
        self.experts = nn.ModuleList(_expert(5, hidden) for hidden in (7, 8, 9, 10))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.embed(x))
        weights, chosen = torch.topk(F.softmax(self.gate(x), dim=-1), 2, dim=-1)
        y = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, rank = torch.where(chosen == number)
            y.index_add_(0, row, expert(x[row]) * weights[row, rank, None])
        return self.head(x + y)


class NumpyInForward(nn.Module):
    """The hidden values leave torch and come back."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 7)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.from_numpy(np.tanh(self.first(x).detach().numpy()))
        return self.head(torch.tanh(self.second(hidden)))


class DataDependentBranch(nn.Module):
    """The input decides which of two layers reads the hidden one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.positive = nn.Linear(8, 7)
        self.negative = nn.Linear(8, 5)
        self.head_positive = nn.Linear(7, 4)
        self.head_negative = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.first(x))
        if x.sum() > 0:
            return self.head_positive(F.relu(self.positive(hidden)))
        return self.head_negative(F.relu(self.negative(hidden)))


class InPlace(nn.Module):
    """Activations and residuals that write over what was there."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 7, 3, padding=1)
        self.outer = nn.Conv2d(7, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu_()
        y = F.leaky_relu(self.inner(x), 0.1, inplace=True)
        x += self.outer(y).mul_(0.5)
        x.clamp_(min=-1.0)
        return self.head(x.mean((2, 3)))


class ViewWrite(nn.Module):
    """Two layers write into the parts of one fresh tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(6, 5)
        self.right = nn.Linear(6, 4)
        self.middle = nn.Linear(9, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_zeros(x.shape[0], 9)
        y[:, :5] = torch.tanh(self.left(x))
        y[:, 5:] = F.relu(self.right(x))
        return self.head(F.relu(self.middle(y)))


PROGRAMS: dict[str, Sample] = {
    # The embedding, what the experts add up to, and the hidden layer of each of 3 experts (which are modules of their
    # own, so their order is none of an axis): 5 groups, 5 orders.
    "mixture_of_experts_loop": Sample(ExpertsLoop, numbers(2, 6)),
    # The embedding, the 3 experts, the hidden layer inside each of them, and what they make together: 4 groups,
    # 6 orders.
    "mixture_of_experts_stacked": Sample(ExpertsStacked, numbers(2, 6)),
    # The embedding with the residual, and the hidden layer of each of 4 experts: 5 groups, 5 orders.
    "mixture_of_experts_top_k": Sample(ExpertsTopK, numbers(12, 6)),
    # Two hidden layers: 2 groups, 2 orders (one of each for a trace that loses the first layer in NumPy).
    "numpy_in_forward": Sample(NumpyInForward, numbers(2, 6)),
    # The hidden layer, and one for each branch (one input takes one branch only): 3 groups, 3 orders.
    "data_dependent_branch": Sample(DataDependentBranch, numbers(2, 6)),
    # The stream and the inside of the block: 2 groups, 2 orders.
    "in_place": Sample(InPlace, images(3)),
    # Two parts and the layer behind them: 3 groups, 3 orders.
    "view_write": Sample(ViewWrite, numbers(2, 6)),
}
