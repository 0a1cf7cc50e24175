"""Models that return one tensor, whatever their library makes of their output."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Output(nn.Module):
    """Gives one tensor of a model's output.

    Attributes:
        model: The model that is called.
        output: The attribute of its output that is returned.
        names: The keywords under which the positional inputs are passed on.
        fixed: Further keyword arguments, the same in each call.
    """

    def __init__(self, model: nn.Module, output: str, names: tuple[str, ...], **fixed: Any) -> None:
        super().__init__()
        self.model = model
        self.output = output
        self.names = names
        self.fixed = fixed

    def forward(self, *inputs: Tensor) -> Tensor:
        return getattr(self.model(**dict(zip(self.names, inputs, strict=True)), **self.fixed), self.output)


def build(model: str, config: str, **settings: Any) -> Any:
    """Returns a random model of transformers, named by its class and the class of its configuration.

    Weights are spread wider than for training (0.02), so that each layer of so small a model moves the output.
    """
    import transformers

    spread = {"initializer_range": 0.2, "init_std": 0.2}
    return getattr(transformers, model)(getattr(transformers, config)(**{**spread, **settings}))
