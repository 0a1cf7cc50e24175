"""What recurrent layers compute step by step, and the regression of their gates.

The gates' pre-activations are fitted on the layer's input and the hidden states that the chosen neurons have in their
sources (the mean hidden states of the aligned sources where none are chosen), never on the fused network's own. Own
states are noisy copies of those; noise in the inputs of a regression shrinks what it finds (regression dilution), a
shrunk hidden map forgets, and its states are noisier still. Measured on rows of MNIST, RNN of 128 neurons, mean
states: 91.3 % in one pass, 71.7 % after one more on own states.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, fx

from mergekit_ot import named_arguments, operation_name
from mergeot_repair.programs.maps import LinearMap

States = Float[Tensor, "batch step neuron"]

# Blocks of rows in a recurrent weight, and the block whose numbers change sign with a negated neuron.
_GATES = {"lstm": (4, 2), "gru": (3, 2), "rnn_tanh": (1, 0), "rnn_relu": (1, 0)}


@dataclass(frozen=True)
class Cell:
    """One layer in one direction.

    Attributes:
        kind: ``lstm``, ``gru``, ``rnn_tanh`` or ``rnn_relu``.
        names: Of its input weight, hidden weight and, where it has them, input bias and hidden bias.
        is_reverse: Whether it reads the steps from the last to the first.
    """

    kind: str
    names: tuple[str, ...]
    is_reverse: bool

    @property
    def gates(self) -> int:
        """Blocks of rows in its weights."""
        return _GATES[self.kind][0]

    @property
    def odd_gate(self) -> int:
        """The block whose numbers change sign with a negated neuron."""
        return _GATES[self.kind][1]

    def tensors(self, state: dict[str, Tensor]) -> list[Tensor]:
        """Returns its parameters."""
        return [state[name] for name in self.names]

    def states(self, tensors: Sequence[Tensor], inputs: States, start: Sequence[Tensor]) -> States:
        """Returns the hidden state after every step.

        Args:
            tensors: Its parameters.
            inputs: What it reads.
            start: Initial hidden state ``[batch, neuron]``, and the cell state of an LSTM.
        """
        steps = inputs.flip(1) if self.is_reverse else inputs
        first = [value[None] for value in start]
        options = (len(tensors) > 2, 1, 0.0, False, False, True)
        if self.kind == "lstm":
            hidden = torch.lstm(steps, first, list(tensors), *options)[0]
        else:
            run = {"gru": torch.gru, "rnn_tanh": torch.rnn_tanh, "rnn_relu": torch.rnn_relu}[self.kind]
            hidden = run(steps, first[0], list(tensors), *options)[0]
        return hidden.flip(1) if self.is_reverse else hidden

    def before(self, states: States, start: Sequence[Tensor]) -> States:
        """Returns the hidden state that each step reads."""
        first = start[0][:, None]
        if self.is_reverse:
            return torch.cat([states[:, 1:], first], 1)
        return torch.cat([first, states[:, :-1]], 1)

    def parts(self, tensors: Sequence[Tensor], inputs: States, before: States) -> tuple[States, States]:
        """Returns what the input map and the hidden map make, biases included: ``[batch, step, gate · neuron]``."""
        biases = tensors[2:] if len(tensors) > 2 else (None, None)
        return (
            torch.nn.functional.linear(inputs, tensors[0], biases[0]),
            torch.nn.functional.linear(before, tensors[1], biases[1]),
        )


def cells_of(kind: str, names: Sequence[str], layers: int, is_bidirectional: bool) -> list[list[Cell]]:
    """Returns the layers of a recurrent operation, each with its directions; none where there are projections."""
    directions = 2 if is_bidirectional else 1
    each = len(names) // (layers * directions)
    if each not in (2, 4):
        return []
    cells = [
        Cell(kind, tuple(names[start : start + each]), number % directions == 1)
        for number, start in enumerate(range(0, len(names), each))
    ]
    return [cells[start : start + directions] for start in range(0, len(cells), directions)]


def layers_of(linear_map: LinearMap, node: fx.Node) -> list[list[Cell]]:
    """Returns the layers of a recurrent operation; none where they cannot be fitted."""
    arguments = named_arguments(node)
    if "batch_sizes" in arguments:
        return []
    kind = operation_name(node).removeprefix("aten.")
    return cells_of(kind, linear_map.parameters, arguments["num_layers"], bool(arguments["bidirectional"]))


def regressions(cell: Cell, hidden: int) -> Iterator[tuple[slice, bool, bool]]:
    """Yields (rows, whether they read the input, whether they read the hidden state) of each separate linear map.

    The new gate of a GRU multiplies what its hidden map makes, so that map is one of its own.
    """
    if cell.kind != "gru":
        yield slice(0, cell.gates * hidden), True, True
        return
    yield slice(0, 2 * hidden), True, True
    yield slice(2 * hidden, 3 * hidden), True, False
    yield slice(2 * hidden, 3 * hidden), False, True
