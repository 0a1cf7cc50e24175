"""Names of a file beside those of its architecture: prefixes, tied tensors left out, and what it has besides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Shaped
from torch import Tensor

from mergekit_ot.storage.limits import shortened
from mergekit_ot.storage.renaming import Renaming
from mergekit_ot.storage.store import TensorStore

# How much the ratio of frequencies that follow each other may vary, by rounding.
_RATIO_TOLERANCE = 1e-2
_SHOWN = 2
# What stands in a file besides the network because the user said so.
IGNORED, OUTSIDE = "ignored", "not behind the prefix"


@dataclass(frozen=True)
class FileNames:
    """How the names of a file differ from those of the architecture that it fits.

    Attributes:
        filled: Name that the file leaves out → name under which it has the same tensor.
        constants: Name that the architecture does not have → what stands there: no weights of the network.
        renaming: Under which names the file has the tensors of the architecture.
        stale: Names of averaged copies of the weights, which are not written beside other weights.

    Example:
        >>> names = FileNames({"head.weight": "embedding.weight"})
        >>> list(names.of_file({"embedding.weight": torch.ones(2), "head.weight": torch.ones(2)}))
        ['embedding.weight']
    """

    filled: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    renaming: Renaming = field(default_factory=Renaming)
    stale: Sequence[str] = ()

    @property
    def sentences(self) -> Iterator[str]:
        """What is taken from where, and what is left out."""
        if self.renaming.sentence:
            yield self.renaming.sentence
        if self.filled:
            pairs = [f"'{shortened(name)}' is '{shortened(held)}'" for name, held in self.filled.items()]
            yield f"tied weights stand in the file once: {_listed(pairs)}"
        kinds: dict[str, list[str]] = {kind: [] for kind in (IGNORED, OUTSIDE, "")}
        for name, kind in self.constants.items():
            shown = f"'{shortened(name)}'"
            kinds[kind if kind in kinds else ""].append(shown if kind in kinds else f"{shown} ({kind})")
        for kind in (IGNORED, OUTSIDE):
            if kinds[kind]:
                yield f"not fused, and left as they are ({kind}): {_listed(kinds[kind])}"
        if kinds[""]:
            yield (
                "not in the architecture, and no weights, so that nothing is computed from them and they stay as they "
                f"are: {_listed(kinds[''])}"
            )
        if self.stale:
            names = [f"'{shortened(name)}'" for name in self.stale]
            yield f"not written on, as it would be out of date beside other weights: {_listed(names)}"

    def of_file(
        self, state: Mapping[str, Tensor], file: Mapping[str, Tensor] | None = None, *, is_renamed: bool = True
    ) -> Mapping[str, Tensor]:
        """Returns a state of the architecture under the names of the file, which has what is still tied once.

        Args:
            state: Name → tensor.
            file: Gives the constants; without it they are left out.
            is_renamed: Whether it goes into a file of the same kind. Into another kind, a state whose names differ by
                more than tied weights goes under the names of the architecture.
        """
        held = self.renaming.held
        if held and not is_renamed:
            return state
        left_out = {name for name in self.filled if self._is_left_out(name, state)}
        kept = {held.get(name, name): tensor for name, tensor in state.items() if name not in left_out}
        constants = {name: file[name] for name in self.constants if file is not None}
        if not held:
            return kept | constants if self.filled or constants else state
        if self.renaming.is_by_place:
            return {name: kept[name] for name in held.values()}
        # What the file lacks (counters) is not added behind its prefix under another name.
        return {name: tensor for name, tensor in kept.items() if name in set(held.values())} | constants

    def _is_left_out(self, name: str, state: Mapping[str, Tensor]) -> bool:
        held = state.get(self.filled.get(name, ""))
        return held is not None and (held is state[name] or torch.equal(held, state[name]))


def constants_among(store: TensorStore, names: Sequence[str]) -> dict[str, str] | None:
    """Returns name → what stands there, where no tensor of the given names can be trained weights; None where one can.

    Args:
        store: Gives the tensors.
        names: Which are looked at.
    """
    kinds = {}
    for name in names:
        kind = constant_kind(store.read(name))
        if kind is None:
            return None
        kinds[name] = kind
    return kinds


def constant_kind(tensor: Tensor) -> str | None:
    """Returns what a tensor is that holds no trained weights: whole numbers, a mask, positions, frequencies; or None.

    Whole numbers of a floating-point type count where they are a single one, a triangle of ones and zeros, or counted
    on from 0; other ones, such as a vector of ones, may be a normalisation that was hardly trained.

    Example:
        >>> [constant_kind(each) for each in (torch.ones(1, 1, 4, 4).tril(), torch.tensor(-1e4), torch.ones(4))]
        ['a mask', 'a single whole number', None]
    """
    if tensor.is_complex():
        return None
    if not tensor.is_floating_point():
        return "whole numbers"
    if tensor.numel() == 1:
        return "a single whole number" if _is_whole(float(tensor)) else None
    numbers = tensor.double()
    if _is_triangle(numbers):
        return "a mask"
    row = numbers.reshape(-1)
    if torch.equal(row, torch.arange(len(row), dtype=row.dtype)):
        return "positions"
    return "frequencies" if _are_frequencies(row) else None


def _is_whole(number: float) -> bool:
    return number in (float("inf"), -float("inf")) or number == int(number) if number == number else False


def _is_triangle(numbers: Shaped[Tensor, ...]) -> bool:
    square = numbers.squeeze()
    if square.ndim != 2 or square.shape[0] != square.shape[1]:
        return False
    ones = torch.ones_like(square)
    return torch.equal(square, ones.tril()) or torch.equal(square, ones.triu(1))


def _are_frequencies(row: Shaped[Tensor, " n"]) -> bool:
    """Whether numbers start at one and fall by one factor, as those of rotary positions do."""
    if len(row) < 3 or float(row[0]) != 1 or bool((row <= 0).any()):
        return False
    ratios = row[1:] / row[:-1]
    return bool((ratios < 1).all()) and float(ratios.max() / ratios.min()) - 1 < _RATIO_TOLERANCE


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
