"""Two small vision transformers: their streams may be turned as a whole, so an order of neurons is not enough."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mergekit_ot import evaluate, fuse, resolve_data

TRAIN, TEST = resolve_data("digits?split=train&batch=100"), resolve_data("digits?split=test")


class VisionTransformer(nn.Module):
    """Four patches of an image, two blocks with norms before the branches, and a norm behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 32, 4, stride=4)
        self.positions = nn.Parameter(0.1 * torch.randn(4, 32))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the logits."""
        stream = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            stream = block(stream)
        return self.head(self.norm(stream).mean(1))


def trained(seed: int, epochs: int) -> nn.Module:
    """Returns a network that was trained from its own start."""
    torch.manual_seed(seed)
    model = VisionTransformer().train()
    optimiser = torch.optim.Adam(model.parameters(), 4e-3)
    for _ in range(epochs):
        for images, labels in TRAIN:
            optimiser.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimiser.step()
    return model.eval()


def main(epochs: int = 8) -> dict[str, float]:
    """Trains, fuses, and returns the accuracies."""
    sources = [trained(seed, epochs) for seed in (0, 1)]
    models = {"source 0": sources[0], "source 1": sources[1]}
    # Orders alone, then rotations of streams and heads, then a fit to what both compute on inputs without labels.
    orders = {"solver": "weight-matching", "solver_options": {"symmetry": "permutation"}}
    models["orders"] = fuse(sources, **orders, data=TRAIN).model()
    models["rotations"] = fuse(sources, solver="weight-matching", data=TRAIN).model()
    models["with refit"] = fuse(sources, solver="activation-matching", data=TRAIN, repair="refit").model()
    return {name: evaluate(model, TEST).accuracy or 0.0 for name, model in models.items()}


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name:16} {accuracy:5.1f} %")
