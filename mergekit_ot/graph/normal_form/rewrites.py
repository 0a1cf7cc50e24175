"""Exact rewrites of a state: gains folded into what reads them, streams centred, biases moved through attention."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor

# Gives the value of one tensor of a state by its name.
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class Refusal:
    """Why a parameter is not brought into the normal form.

    Attributes:
        parameter: Its name.
        reason: A sentence for the user.

    Example:
        >>> Refusal("norm.weight", "Its norm is read by aten.add, which is no linear map.").parameter
        'norm.weight'
    """

    parameter: str
    reason: str


@dataclass(frozen=True)
class Place:
    """An axis of a tensor, at a stretch of another of its axes.

    Attributes:
        name: Name in the state.
        axis: The axis on which the neurons stand.
        rows_axis: Another axis, of which only `rows` are meant; None for the whole tensor.
        rows: Start and end on that axis.

    Example:
        >>> Place("attention.in_proj_weight", 1, 0, (0, 2)).view(torch.arange(12).reshape(6, 2)).tolist()
        [[0, 1], [2, 3]]
    """

    name: str
    axis: int
    rows_axis: int | None = None
    rows: tuple[int, int] = (0, 0)

    def view(self, value: Tensor) -> Tensor:
        """Returns the part of a tensor that is meant, as a view."""
        if self.rows_axis is None:
            return value
        return value.narrow(self.rows_axis, self.rows[0], self.rows[1] - self.rows[0])

    def overlaps(self, other: Place) -> bool:
        """Whether both mean a common number of one tensor."""
        if self.name != other.name:
            return False
        if self.rows_axis is None or self.rows_axis != other.rows_axis:
            return True
        return self.rows[0] < other.rows[1] and other.rows[0] < self.rows[1]


@dataclass(frozen=True)
class Reader:
    """A linear map that reads neurons.

    Attributes:
        weight: Where they stand in its weight; the rows are its outputs.
        outputs_axis: The weight's axis of outputs.
        bias: Name of its bias, or None.
        bias_start: Where its outputs start in the bias.

    Example:
        >>> Reader(Place("head.weight", 1), 0).constant(torch.ones(3, 2), torch.tensor([1.0, 2.0])).tolist()
        [3.0, 3.0, 3.0]
    """

    weight: Place
    outputs_axis: int
    bias: str | None = None
    bias_start: int = 0

    def constant(self, weight: Tensor, shift: Float[Tensor, " d"]) -> Float[Tensor, " outputs"]:
        """Returns what the outputs gain where a constant is added to the neurons: R·b.

        Args:
            weight: The whole weight.
            shift: The constant, one number per neuron.
        """
        view = self.weight.view(weight)
        product = (view * _along(shift, self.weight.axis, view.ndim)).movedim(self.outputs_axis, 0)
        return product.flatten(1).sum(1)

    def shifted(self, bias: Float[Tensor, " n"], constant: Float[Tensor, " outputs"]) -> Float[Tensor, " n"]:
        """Returns the bias with a constant added to the outputs of this map."""
        moved = bias.clone()
        moved[self.bias_start : self.bias_start + len(constant)] += constant
        return moved


@dataclass(frozen=True)
class AbstractRewrite(ABC):
    """Something that changes a state and keeps its function, one tensor at a time.

    Attributes:
        tied: Further name of a tied tensor → the name under which it is described, for the tensors that it writes.

    Example:
        >>> fold = Fold((), "norm.weight", None, (Reader(Place("head.weight", 1), 0),))
        >>> state = {"norm.weight": torch.tensor([2.0, 3.0]), "head.weight": torch.ones(1, 2)}
        >>> {name: fold.tensor(name, state.__getitem__).tolist() for name in state}
        {'norm.weight': [1.0, 1.0], 'head.weight': [[2.0, 3.0]]}
    """

    tied: tuple[tuple[str, str], ...]

    @property
    def names(self) -> frozenset[str]:
        """Names of the state that it writes, further names of tied tensors included."""
        return self._names

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset((*self._written(), *(further for further, _ in self.tied)))

    def tensor(self, name: str, read: Read) -> Tensor:
        """Returns the new value of one tensor.

        Args:
            name: One of `names`.
            read: Gives old values by name.
        """
        return self._value(dict(self.tied).get(name, name), read)

    @abstractmethod
    def _written(self) -> Iterator[str]:
        """Yields the names under which what it writes is described."""

    @abstractmethod
    def _value(self, name: str, read: Read) -> Tensor:
        """Returns the new value of one tensor by the name under which it is described."""


@final
@dataclass(frozen=True)
class Fold(AbstractRewrite):
    """A norm's gain and bias go into the linear maps that read the norm.

    R ← R·diag(g), bias of R ← bias of R + R·b, g ← 1, b ← 0. A map without a bias takes R·b from a constant: where the
    norm is a LayerNorm its value is orthogonal to the all-ones vector, so b ← 1 and R ← R·diag(g)·M + R·b·1'/d with
    M = I - 11'/d computes the same.

    Attributes:
        gain: Name of the gain; None where the norm has none.
        bias: Name of the norm's bias, or None.
        readers: The maps.
        offset: What the forward adds to the gain: 1 where it multiplies by 1 + g.
        is_constant: Whether the norm's bias becomes all ones, for a reader without bias.
    """

    gain: str | None
    bias: str | None
    readers: tuple[Reader, ...]
    offset: float = 0.0
    is_constant: bool = False

    def _written(self) -> Iterator[str]:
        yield from (name for name in (self.gain, self.bias) if name is not None)
        for reader in self.readers:
            yield reader.weight.name
            if self.bias is not None and reader.bias is not None:
                yield reader.bias

    def _value(self, name: str, read: Read) -> Tensor:
        value = read(name)
        if name == self.gain:
            return torch.full_like(value, 1 - self.offset)
        if name == self.bias:
            return torch.full_like(value, float(self.is_constant))
        value = value.clone()
        for reader in self.readers:
            if reader.weight.name == name:
                self._fold(reader, value, read)
            elif reader.bias == name and self.bias is not None:
                constant = reader.constant(read(reader.weight.name), read(self.bias).flatten())
                value = reader.shifted(value, constant)
        return value

    def _fold(self, reader: Reader, value: Tensor, read: Read) -> None:
        """Folds into the part of a weight that reads the norm, in place."""
        view, axis = reader.weight.view(value), reader.weight.axis
        folded = view
        if self.gain is not None:
            folded = view * _along(read(self.gain).flatten() + self.offset, axis, view.ndim)
        if self.is_constant:
            folded = _centred(folded, axis)
            if reader.bias is None and self.bias is not None:
                shift = _along(read(self.bias).flatten(), axis, view.ndim)
                folded = folded + (view * shift).mean(axis, keepdim=True)
        view.copy_(folded)


@final
@dataclass(frozen=True)
class Centre(AbstractRewrite):
    """What writes to a stream that only LayerNorms read has mean zero along it, and so has what reads them.

    W ← M·W and R ← R·M with M = I - 11'/d.

    Attributes:
        places: The axes of the stream, one per tensor or part of a tensor.

    Example:
        >>> centre = Centre((), (Place("table.weight", 1),))
        >>> centre.tensor("table.weight", {"table.weight": torch.tensor([[1.0, 3.0]])}.__getitem__).tolist()
        [[-1.0, 1.0]]
    """

    places: tuple[Place, ...]

    def _written(self) -> Iterator[str]:
        yield from (place.name for place in self.places)

    def _value(self, name: str, read: Read) -> Tensor:
        value = read(name).clone()
        for place in self.places:
            if place.name == name:
                view = place.view(value)
                view.copy_(_centred(view, place.axis))
        return value


@final
@dataclass(frozen=True)
class MoveBias(AbstractRewrite):
    """A bias that attention passes on or does not see goes away.

    Weights of attention sum to one, so a bias b of the values adds O·b to the output: bias of O ← bias of O + O·b,
    b ← 0. A bias of the keys adds the same to all scores of a query, which softmax does not see: b ← 0.

    Attributes:
        bias: Name of the bias.
        entries: Which entries of it go away.
        readers: The output projections, each with which entry of the bias stands at each of its inputs.

    Example:
        >>> move = MoveBias((), "key.bias", (1,))
        >>> move.tensor("key.bias", {"key.bias": torch.tensor([4.0, 5.0])}.__getitem__).tolist()
        [4.0, 0.0]
    """

    bias: str
    entries: tuple[int, ...]
    readers: tuple[tuple[Reader, tuple[int, ...]], ...] = ()

    def _written(self) -> Iterator[str]:
        yield self.bias
        yield from (reader.bias for reader, _ in self.readers if reader.bias is not None)

    def _value(self, name: str, read: Read) -> Tensor:
        value = read(name).clone()
        for reader, inputs in self.readers:
            if reader.bias == name:
                shift = read(self.bias)[torch.tensor(inputs)]
                value = reader.shifted(value, reader.constant(read(reader.weight.name), shift))
        if name == self.bias:
            value[torch.tensor(self.entries)] = 0
        return value


def _along(values: Float[Tensor, " d"], axis: int, rank: int) -> Float[Tensor, ...]:
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def _centred(value: Float[Tensor, ...], axis: int) -> Float[Tensor, ...]:
    return value - value.mean(axis, keepdim=True)
