"""Recurrent networks: torch's modules in their variants, cells in loops, and gates written by hand."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from architectures.base import Sample, numbers, tokens


class LastState(nn.Module):
    """A recurrent module and a linear layer on the last state of its last layer."""

    def __init__(self, recurrent: nn.RNNBase) -> None:
        super().__init__()
        self.recurrent = recurrent
        self.head = nn.Linear(recurrent.proj_size or recurrent.hidden_size, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = self.recurrent(x)[1]
        return self.head((state[0] if isinstance(state, tuple) else state)[-1])


class BothStates(nn.Module):
    """A bidirectional LSTM; the last states of both directions side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, 4)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(x)
        return self.head(torch.cat([hidden[-2], hidden[-1]], dim=1))


class MeanOutput(nn.Module):
    """A recurrent module, and a linear layer on the mean of its outputs over time."""

    def __init__(self, recurrent: nn.RNNBase, time: int = 1) -> None:
        super().__init__()
        self.recurrent, self.time = recurrent, time
        width = recurrent.proj_size or recurrent.hidden_size
        self.head = nn.Linear(2 * width if recurrent.bidirectional else width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[0].mean(self.time))


class LastOutput(nn.Module):
    """An LSTM that takes the batch first, and a linear layer on its last output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 6, batch_first=True)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.lstm(x)
        return self.head(out[:, -1, :])


class CellsLoop(nn.Module):
    """An LSTM cell that feeds a GRU cell, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.lower = nn.LSTMCell(3, 5)
        self.upper = nn.GRUCell(5, 7)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden, cell = x.new_zeros(x.shape[0], 5), x.new_zeros(x.shape[0], 5)
        upper = x.new_zeros(x.shape[0], 7)
        for step in range(x.shape[1]):
            hidden, cell = self.lower(x[:, step], (hidden, cell))
            upper = self.upper(hidden, upper)
        return self.head(upper)


class HandwrittenLstm(nn.Module):
    """One linear layer makes all four gates of input and state."""

    def __init__(self) -> None:
        super().__init__()
        self.gates = nn.Linear(3 + 6, 4 * 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = cell = torch.zeros(x.shape[0], 6, dtype=x.dtype, device=x.device)
        outputs = []
        for step in range(x.shape[1]):
            new, take, keep, give = self.gates(torch.cat([x[:, step], hidden], -1)).chunk(4, -1)
            cell = keep.sigmoid() * cell + take.sigmoid() * new.tanh()
            hidden = give.sigmoid() * cell.tanh()
            outputs.append(hidden)
        return self.head(torch.stack(outputs, 1))


class PackedLstm(nn.Module):
    """Sequences of different length, packed and padded again."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        out, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=x.shape[1])
        return self.head(out.sum(1) / lengths[:, None])


class PackedGruState(nn.Module):
    """Embedded sequences of different length, packed; only the last state is used."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6, padding_idx=0)
        self.gru = nn.GRU(6, 5, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(self.embedding(words), lengths, batch_first=True, enforce_sorted=False)
        _, state = self.gru(packed)
        return self.head(state.squeeze(0))


class AttentionPooling(nn.Module):
    """Embedded words, a bidirectional LSTM, and a mean over time that is weighted by attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.lstm = nn.LSTM(6, 5, batch_first=True, bidirectional=True)
        self.score = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1, bias=False))
        self.head = nn.Linear(10, 4)

    def forward(self, words: Tensor) -> Tensor:
        out, _ = self.lstm(self.embedding(words))
        weights = torch.softmax(self.score(out).squeeze(-1), dim=1)
        return self.head(torch.bmm(weights.unsqueeze(1), out).squeeze(1))


class Seq2seq(nn.Module):
    """The decoder starts from the encoder's state, attends to its outputs, and its words are tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.source = nn.Embedding(11, 5)
        self.target = nn.Embedding(13, 6)
        self.encoder = nn.GRU(5, 8, batch_first=True)
        self.decoder = nn.GRU(6, 8, batch_first=True)
        self.combine = nn.Linear(16, 6)
        self.words = nn.Linear(6, 13, bias=False)
        self.words.weight = self.target.weight

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        memory, state = self.encoder(self.source(source))
        out, _ = self.decoder(self.target(target), state)
        context = torch.softmax(out @ memory.transpose(1, 2), -1) @ memory
        return self.words(torch.tanh(self.combine(torch.cat([out, context], -1))))


class StackedLstms(nn.Module):
    """Two LSTMs with LayerNorm and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 5)
        self.first = nn.LSTM(5, 7, batch_first=True)
        self.norm = nn.LayerNorm(7)
        self.second = nn.LSTM(7, 7, batch_first=True)
        self.head = nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.first(torch.relu(self.embed(x)))
        y, _ = self.second(self.norm(x))
        return self.head(x + y)


class LearnedInitialState(nn.Module):
    """A GRU whose first states are one parameter, a row per layer."""

    def __init__(self) -> None:
        super().__init__()
        self.state = nn.Parameter(torch.randn(2, 1, 5))
        self.gru = nn.GRU(3, 5, num_layers=2, batch_first=True)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        out, _ = self.gru(x, self.state.expand(-1, x.shape[0], -1).contiguous())
        return self.head(out[:, -1])


def _with_lengths(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, torch.tensor([4, 6, 3])


class ConcatenatedCell(nn.Module):
    """A cell that reads its input and its state, zeros at first, as one vector."""

    def __init__(self) -> None:
        super().__init__()
        self.state, self.output = nn.Linear(12, 7), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.zeros(x.shape[0], 7, dtype=x.dtype)
        for step in range(x.shape[1] - 1):
            hidden = torch.tanh(self.state(torch.cat([x[:, step], hidden], 1)))
        return self.output(torch.cat([x[:, -1], hidden], 1))


RECURRENT: dict[str, Sample] = {
    # The hidden neurons: 1 group, 1 order.
    "rnn_tanh_last": Sample(lambda: LastState(nn.RNN(3, 5, batch_first=True)), numbers(2, 6, 3)),
    # A layer each: 2 groups, 2 orders.
    "rnn_relu": Sample(lambda: MeanOutput(nn.RNN(3, 5, 2, nonlinearity="relu", batch_first=True)), numbers(2, 6, 3)),
    # The hidden neurons, over all gates: 1 group, 1 order.
    "lstm_one_no_bias": Sample(lambda: LastState(nn.LSTM(3, 5, bias=False, batch_first=True)), numbers(2, 6, 3)),
    # A layer each: 2 groups, 2 orders.
    "lstm_two": Sample(lambda: LastState(nn.LSTM(3, 5, num_layers=2)), numbers(6, 2, 3)),
    # The cell and the projection of each of two layers: 4 groups, 4 orders.
    "lstm_projected": Sample(
        lambda: MeanOutput(nn.LSTM(3, 7, num_layers=2, proj_size=5, batch_first=True)), numbers(2, 6, 3)
    ),
    # Two layers in two directions: 4 groups, 4 orders.
    "lstm_bidirectional_mean": Sample(
        lambda: MeanOutput(nn.LSTM(3, 5, num_layers=2, batch_first=True, bidirectional=True)), numbers(2, 6, 3)
    ),
    # Two directions: 2 groups, 2 orders.
    "lstm_bidirectional_state": Sample(BothStates, numbers(2, 6, 3)),
    # Two layers in two directions: 4 groups, 4 orders.
    "gru_two_bidirectional": Sample(
        lambda: MeanOutput(nn.GRU(3, 5, num_layers=2, batch_first=True, bidirectional=True)), numbers(2, 6, 3)
    ),
    # The hidden neurons: 1 group, 1 order.
    "gru_time_first": Sample(lambda: MeanOutput(nn.GRU(3, 5), time=0), numbers(6, 2, 3)),
    # The hidden neurons: 1 group, 1 order.
    "lstm_batch_first": Sample(LastOutput, numbers(2, 7, 3)),
    # One per cell: 2 groups, 2 orders.
    "cells_loop": Sample(CellsLoop, numbers(2, 6, 3)),
    # The hidden neurons, over all gates and the state that is read: 1 group, 1 order.
    "handwritten_lstm": Sample(HandwrittenLstm, numbers(2, 5, 3)),
    # A layer each: 2 groups, 2 orders.
    "packed_lstm": Sample(PackedLstm, lambda: _with_lengths(*numbers(3, 6, 3)())),
    # The embedding and the hidden neurons: 2 groups, 2 orders.
    "packed_gru_state": Sample(PackedGruState, lambda: _with_lengths(*tokens(11, 6, 3)())),
    # The embedding, two directions, and the hidden layer of the scores: 4 groups, 4 orders.
    "embedding_lstm_attention_pooling": Sample(AttentionPooling, tokens(11)),
    # The source embedding, the state that encoder and decoder share, and the target embedding, which is also the
    # output's: 3 groups, 3 orders.
    "seq2seq": Sample(Seq2seq, lambda: (*tokens(11)(), *tokens(13, 4)())),
    # The embedding, and one stream that both LSTMs' hidden neurons add to: 2 groups, 2 orders.
    "stacked_lstms": Sample(StackedLstms, numbers(2, 6, 3)),
    # A layer each, and a row of the parameter for each: 2 groups, 2 orders (1 where the rows of one parameter must
    # share their order).
    "learned_initial_state": Sample(LearnedInitialState, numbers(2, 6, 3)),
    # The state, whose columns stand behind those of the input.
    "concatenated_cell": Sample(ConcatenatedCell, numbers(2, 4, 5)),
}
