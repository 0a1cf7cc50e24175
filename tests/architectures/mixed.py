"""Everything else: several outputs, shared modules, sets, graphs, flows and hybrids."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from architectures.base import Sample, images, numbers
from architectures.mixed_inputs import INPUTS
from architectures.mixed_programs import PROGRAMS


class SiameseConvolutional(nn.Module):
    """Shared convolutions on two pictures, compared by the difference of their features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 5, 3)
        self.conv2 = nn.Conv2d(5, 6, 3)
        self.features = nn.Linear(6 * 4, 9)
        self.head = nn.Linear(9, 2)

    def once(self, x: Tensor) -> Tensor:
        """Returns the features of one picture."""
        x = F.max_pool2d(F.relu(self.conv2(F.relu(self.conv1(x)))), 2)
        return torch.sigmoid(self.features(torch.flatten(x, 1)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.head(torch.abs(self.once(x) - self.once(y)))


class ActorCritic(nn.Module):
    """A shared trunk, and a head each for the policy and the value."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 8), nn.Tanh())
        self.policy = nn.Sequential(nn.Linear(8, 7), nn.Tanh(), nn.Linear(7, 4))
        self.value = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.trunk(x)
        return F.log_softmax(self.policy(x), -1), self.value(x).squeeze(-1)


class DeepSets(nn.Module):
    """Every element is embedded on its own; their sum is read."""

    def __init__(self) -> None:
        super().__init__()
        self.element = nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 8))
        self.whole = nn.Sequential(nn.Linear(8, 9), nn.ReLU(), nn.Linear(9, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.whole(self.element(x).sum(dim=1))


class AutoencoderConvolutional(nn.Module):
    """Convolutions down to a few numbers, and transposed convolutions up again."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 5, 3, 2, 1), nn.ReLU(), nn.Conv2d(5, 6, 3, 2, 1), nn.ReLU())
        self.narrow = nn.Linear(6 * 4, 9)
        self.widen = nn.Linear(9, 7 * 4)
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(7, 8, 2, 2), nn.ReLU(), nn.ConvTranspose2d(8, 1, 2, 2), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        code = self.narrow(self.encoder(x).flatten(1))
        return self.decoder(F.relu(self.widen(code)).view(-1, 7, 2, 2))


class Highway(nn.Module):
    """Gates choose between what a layer makes and what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.made = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for made, gates in zip(self.made, self.gates, strict=True):
            gate = torch.sigmoid(gates(x))
            x = gate * F.relu(made(x)) + (1 - gate) * x
        return self.head(x)


class MultiScale(nn.Module):
    """A fine and a coarse convolution of the same features, added at the fine size."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 5, 3, padding=1)
        self.fine = nn.Conv2d(5, 7, 3, padding=1)
        self.coarse = nn.Conv2d(5, 7, 3, stride=2, padding=1)
        self.head = nn.Conv2d(7, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        fine, coarse = self.fine(x), self.coarse(x)
        coarse = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        return self.head(F.relu(fine + coarse))


class GraphConvolution(nn.Module):
    """Node features are mixed along a dense adjacency matrix; the sum over the nodes is read."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(3, 8))
        self.second = nn.Parameter(torch.randn(8, 6) / 3)
        self.bias = nn.Parameter(torch.randn(8))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        x = F.relu(adjacency @ x @ self.first + self.bias)
        x = F.relu(adjacency @ (x @ self.second))
        return self.head(x.sum(1))


class NeuralOdeEuler(nn.Module):
    """A few Euler steps of one block, which is told the time."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 7)
        self.block = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 7))
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for step in range(4):
            time = torch.full_like(x[:, :1], step / 4)
            x = x + self.block(torch.cat([x, time], 1)) / 4
        return self.head(x)


class NormalisingCoupling(nn.Module):
    """Two affine couplings: each half scales and shifts the other; gives the latent and its log-determinant."""

    def __init__(self) -> None:
        super().__init__()
        self.nets = nn.ModuleList(
            nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2 * 3)) for width in (7, 8)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.new_zeros(x.shape[0])
        for net in self.nets:
            kept, changed = torch.split(x, 3, dim=1)
            scale, shift = net(kept).chunk(2, dim=1)
            scale = torch.tanh(scale)
            x = torch.cat([changed * torch.exp(scale) + shift, kept], dim=1)
            total = total + scale.sum(1)
        return x, total


class TransformerConvHybrid(nn.Module):
    """Convolutions, attention between the places of their map, and a convolution over the map again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 5, 3, 2, 1), nn.ReLU(), nn.Conv2d(5, 10, 1))
        self.norm = nn.LayerNorm(10)
        self.attention = nn.MultiheadAttention(10, 2, batch_first=True)
        self.last = nn.Conv2d(10, 7, 3)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(x.flatten(2).transpose(1, 2))
        y, _ = self.attention(y, y, y)
        x = x + y.transpose(1, 2).reshape(x.shape)
        return self.head(F.relu(self.last(x)).amax((2, 3)))


class GatedConvolution(nn.Module):
    """Half of the channels gate the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 2 * 5, 3)
        self.conv2 = nn.Conv2d(5, 2 * 6, 3)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.conv2(F.glu(self.conv1(x), dim=1)), dim=1)
        return self.head(x.mean((2, 3)))


class MixtureDensity(nn.Module):
    """Weights, means and deviations of a mixture of Gaussians."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 7), nn.Tanh())
        self.head = nn.Linear(7, 3 * 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        weight, mean, deviation = torch.split(self.head(self.hidden(x)), 5, dim=-1)
        return F.softmax(weight, -1), mean, F.softplus(deviation) + 1e-3


def _pictures() -> tuple[Tensor, ...]:
    return numbers(2, 2, 1, 8, 8)()[0].unbind()


def _graph() -> tuple[Tensor, ...]:
    edges = (numbers(2, 5, 5)()[0] > 0).float()
    return *numbers(2, 5, 3)(), edges + torch.eye(5)


MIXED: dict[str, Sample] = {
    # Two convolutions and the features: 3 groups, 3 orders.
    "siamese_convolutional": Sample(SiameseConvolutional, _pictures),
    # Two layers of the trunk and one inside each head: 4 groups, 4 orders.
    "actor_critic": Sample(ActorCritic, numbers(2, 6)),
    # Two layers per element, and one behind the sum: 3 groups, 3 orders.
    "deep_sets": Sample(DeepSets, numbers(2, 5, 3)),
    # Two channels down, the code, and two channels up: 5 groups, 5 orders.
    "autoencoder_convolutional": Sample(AutoencoderConvolutional, images(1)),
    # The stream: 1 group, 1 order.
    "highway": Sample(Highway, numbers(2, 6)),
    # The stem, and the channels that both scales share: 2 groups, 2 orders.
    "multi_scale": Sample(MultiScale, images(3)),
    # Two hidden layers: 2 groups, 2 orders.
    "graph_convolution": Sample(GraphConvolution, _graph),
    # The state and the inside of the block: 2 groups, 2 orders.
    "neural_ode_euler": Sample(NeuralOdeEuler, numbers(2, 6)),
    # The hidden layer of each coupling: 2 groups, 2 orders.
    "normalising_coupling": Sample(NormalisingCoupling, numbers(2, 6)),
    # The first convolution, the stream, the heads, inside each of 2 heads query/key and value/output, and the last
    # convolution: 6 groups, 8 orders.
    "transformer_conv_hybrid": Sample(TransformerConvHybrid, images(3)),
    # The channels of two convolutions, each with its gate: 2 groups, 2 orders.
    "gated_convolution": Sample(GatedConvolution, images(3)),
    # Two hidden layers: 2 groups, 2 orders.
    "mixture_density": Sample(MixtureDensity, numbers(2, 6)),
    **INPUTS,
    **PROGRAMS,
}
