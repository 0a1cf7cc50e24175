"""Convolutions that make pictures, convolutions over time, and weights under a parametrization."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from architectures.base import Sample, images, numbers


class PixelShuffle(nn.Module):
    """Super resolution: channels become pixels, and a last convolution smooths them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 5 * 4, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)
        self.last = nn.Conv2d(5, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.shuffle(self.second(torch.tanh(self.first(x))))))


class UnetInterpolate(nn.Module):
    """Two levels down by pooling, two up by interpolation, and both skips concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = nn.Conv2d(1, 4, 3, padding=1)
        self.down2 = nn.Conv2d(4, 6, 3, padding=1)
        self.bottom = nn.Conv2d(6, 9, 3, padding=1)
        self.up2 = nn.Conv2d(15, 7, 3, padding=1)
        self.up1 = nn.Conv2d(11, 5, 3, padding=1)
        self.out = nn.Conv2d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip1 = F.relu(self.down1(x))
        skip2 = F.relu(self.down2(F.max_pool2d(skip1, 2)))
        x = F.relu(self.bottom(F.max_pool2d(skip2, 2)))
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        x = F.relu(self.up2(torch.cat([skip2, x], 1)))
        x = F.interpolate(x, size=skip1.shape[2:], mode="bilinear", align_corners=False)
        return self.out(F.relu(self.up1(torch.cat([skip1, x], 1))))


class GanGenerator(nn.Module):
    """Latent numbers become a picture through transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(
            *(nn.ConvTranspose2d(6, 9, 2, 1, 0, bias=False), nn.BatchNorm2d(9), nn.ReLU(True)),
            *(nn.ConvTranspose2d(9, 7, 4, 2, 1, bias=False), nn.BatchNorm2d(7), nn.ReLU(True)),
            *(nn.ConvTranspose2d(7, 3, 4, 2, 1, bias=False), nn.Tanh()),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x[:, :, None, None])


class Vae(nn.Module):
    """Encodes to means and variances, and decodes the means; noise is added in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(12, 9)
        self.mean = nn.Linear(9, 4)
        self.variance = nn.Linear(9, 4)
        self.decoder = nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 12), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.encoder(x))
        latent, variance = self.mean(hidden), self.variance(hidden)
        if self.training:
            latent = latent + torch.randn_like(latent) * torch.exp(variance / 2)
        return self.decoder(latent)


class WeightNormed(nn.Module):
    """Two linear layers whose weights are a direction and a length."""

    def __init__(self) -> None:
        super().__init__()
        self.first = weight_norm(nn.Linear(6, 9))
        self.second = weight_norm(nn.Linear(9, 7))
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class SpectralNormed(nn.Module):
    """A discriminator whose weights are divided by their largest singular value."""

    def __init__(self) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Conv2d(3, 5, 3))
        self.second = spectral_norm(nn.Conv2d(5, 7, 3, 2))
        self.head = spectral_norm(nn.Linear(7 * 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.second(F.leaky_relu(self.first(x), 0.2)), 0.2)
        return self.head(x.flatten(1))


class ConvLstm(nn.Module):
    """A convolutional LSTM cell, written by hand, over a few frames."""

    def __init__(self) -> None:
        super().__init__()
        self.width = 5
        self.gates = nn.Conv2d(2 + 5, 4 * 5, 3, padding=1)
        self.head = nn.Conv2d(5, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = cell = x.new_zeros(x.shape[0], self.width, x.shape[-2], x.shape[-1])
        for frame in x.unbind(1):
            one, keep, new, out = torch.split(self.gates(torch.cat([frame, hidden], 1)), self.width, 1)
            cell = torch.sigmoid(keep) * cell + torch.sigmoid(one) * torch.tanh(new)
            hidden = torch.sigmoid(out) * torch.tanh(cell)
        return self.head(hidden)


GENERATIVE: dict[str, Sample] = {
    # The first convolution, and the 5 channels that are left of 20: 2 groups, 2 orders.
    "pixel_shuffle": Sample(PixelShuffle, images(1, 6)),
    # All convolutions but the last: 5 groups, 5 orders.
    "unet_interpolate": Sample(UnetInterpolate, images(1)),
    # What lies between the three transposed convolutions: 2 groups, 2 orders.
    "gan_generator": Sample(GanGenerator, numbers(2, 6)),
    # The encoder's hidden layer, the latent means, the decoder's hidden layer (nothing reads the variances in
    # evaluation): 3 groups, 3 orders.
    "vae": Sample(Vae, numbers(2, 12)),
    # Two hidden layers: 2 groups, 2 orders.
    "weight_normed": Sample(WeightNormed, numbers(2, 6)),
    # Two hidden layers, which the singular vectors follow: 2 groups, 2 orders.
    "spectral_normed": Sample(SpectralNormed, images(3)),
    # The hidden state, its cell and all four gates: 1 group, 1 order.
    "conv_lstm_cell": Sample(ConvLstm, numbers(2, 3, 2, 6, 6)),
}
