"""A callback of Lightning that fuses the network of a run with those of earlier runs. Needs: pip install lightning."""

from __future__ import annotations

import lightning
import torch
from torch import Tensor, nn

from mergekit_ot import evaluate, fuse, resolve_data

TRAIN, TEST = resolve_data("digits?split=train&batch=100"), resolve_data("digits?split=test")


class Classifier(lightning.LightningModule):
    """A perceptron as Lightning trains it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Returns the loss of a batch."""
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns the optimiser."""
        return torch.optim.Adam(self.parameters(), 3e-3)


class FuseWith(lightning.Callback):
    """Fuses the trained network with others when a run ends; the module itself keeps its weights."""

    def __init__(self, others: list[nn.Module]) -> None:
        self.others = others
        self.fused: nn.Module | None = None

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Fuses the plain networks inside: a LightningModule holds its trainer, which is none of a network's."""
        nets = [module.net for module in (*self.others, pl_module)]
        self.fused = fuse(nets, solver="activation-matching", data=TRAIN, repair="refit").model()


def main(epochs: int = 10) -> dict[str, float]:
    """Trains two runs, fuses at the end of the second, and returns the accuracies."""
    options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    runs, fusing = [], FuseWith([])
    for seed, callbacks in ((0, []), (1, [fusing])):
        lightning.seed_everything(seed, verbose=False)
        trainer = lightning.Trainer(max_epochs=epochs, accelerator="cpu", logger=False, callbacks=callbacks, **options)
        runs.append(Classifier())
        fusing.others = runs[:1]
        trainer.fit(runs[-1], TRAIN)
    models = {"run 0": runs[0].net, "run 1": runs[1].net, "fused": fusing.fused}
    return {name: evaluate(model, TEST).accuracy or 0.0 for name, model in models.items() if model is not None}


if __name__ == "__main__":
    for name, accuracy in main().items():
        print(f"{name:16} {accuracy:5.1f} %")
