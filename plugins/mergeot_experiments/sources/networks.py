"""Recurrent networks that read an image row by row, as in the experiments of arXiv:2210.06671."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from mergekit_ot import ArchitectureError
from mergekit_ot.errors import unknown_name

_CELLS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class RowNetwork(nn.Module):
    """A recurrent layer over the rows of an image, and a linear layer on its last state."""

    def __init__(self, cell: str, hidden: int, layers: int, columns: int, classes: int, bias: bool) -> None:
        super().__init__()
        self.columns = columns
        self.recurrent = _CELLS[cell](columns, hidden, layers, bias=bias, batch_first=True)
        self.classifier = nn.Linear(hidden, classes, bias)

    def forward(self, images: Float[Tensor, "batch 1 row column"]) -> Float[Tensor, "batch output"]:
        """Returns the class scores."""
        rows = images.reshape(images.shape[0], -1, self.columns)
        states, _ = self.recurrent(rows)
        return self.classifier(states[:, -1])


def rows(
    cell: str = "lstm", hidden: int = 128, layers: int = 1, columns: int = 28, classes: int = 10, bias: bool = True
) -> nn.Module:
    """Builds a recurrent network that reads an image one row a step.

    Args:
        cell: rnn (tanh), lstm or gru.
        hidden: Neurons of each recurrent layer.
        layers: Recurrent layers, one on top of the other.
        columns: Pixels of a row.
        classes: Outputs.
        bias: Whether the layers have biases.

    Raises:
        ArchitectureError: The cell is unknown.
    """
    if cell not in _CELLS:
        raise ArchitectureError(unknown_name("cell", cell, _CELLS))
    return RowNetwork(cell, hidden, layers, columns, classes, bias)
