"""How unlike two blocks are: by what they do to the stream on calibration data, else by the sizes of their weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mergekit_ot.fusion.depth.series import Series
from mergekit_ot.fusion.running import repeatable
from mergekit_ot.fusion.source import SourceModel

Gram = Float[Tensor, "row row"]
Batches = Sequence[tuple[object, ...]]
# Of sequences, positions are compared, that many in a batch at most.
_ROWS = 512
# Decides only between blocks that look the same.
_OF_PLACES = 1e-6


@final
@dataclass(frozen=True)
class WeightLikeness:
    """Blocks are alike whose weights have the same sizes: what no order of neurons changes.

    Attributes:
        shallow: The network with fewer blocks.
        deep: The other; where it has no weights, blocks are told by their places alone.
    """

    shallow: SourceModel
    deep: SourceModel

    def costs(self, series: Series) -> Float[Tensor, "own other"]:
        """Returns how unlike the blocks of a row are."""
        if not self.deep.state:
            return _of_places(len(series.shallow), len(series.deep))
        ours, theirs = (
            [self._seen(source, path, series) for path in paths]
            for source, paths in ((self.shallow, series.shallow), (self.deep, series.deep))
        )
        costs = [[_distance(own, other) for other in theirs] for own in ours]
        return torch.tensor(costs, dtype=torch.float64) + _OF_PLACES * _of_places(len(ours), len(theirs))

    def _seen(self, source: SourceModel, path: str, series: Series) -> list[Tensor]:
        """Returns the sorted norms of the rows and columns of every weight of a block."""
        kinds = series.shallow if source is self.shallow else series.deep
        tensors = [source.state.read(f"{path}{rest}") for rest, _ in kinds[path] if f"{path}{rest}" in source.state]
        seen: list[Tensor] = []
        for tensor in tensors:
            if tensor.is_floating_point() and tensor.numel():
                rows = tensor.detach().float().reshape(max(len(tensor), 1) if tensor.ndim else 1, -1)
                columns = rows if tensor.ndim < 3 else tensor.detach().float().flatten(2).norm(dim=2)
                seen += [rows.norm(dim=1).sort().values, columns.norm(dim=0).sort().values]
        return seen


@final
@dataclass(frozen=True)
class UpdateLikeness:
    """Blocks are alike that add like things to the stream: by CKA (arXiv:1905.00414) of what leaves less what enters.

    Attributes:
        shallow: Path → one Gram matrix per batch, of the network with fewer blocks.
        deep: The same of the other.
    """

    shallow: Mapping[str, Sequence[Gram]]
    deep: Mapping[str, Sequence[Gram]]

    def costs(self, series: Series) -> Float[Tensor, "own other"]:
        """Returns how unlike the blocks of a row are."""
        costs = [[1 - _cka(self.shallow[own], self.deep[other]) for other in series.deep] for own in series.shallow]
        places = _of_places(len(series.shallow), len(series.deep))
        return torch.tensor(costs, dtype=torch.float64) + _OF_PLACES * places


def update_likeness(
    shallow: SourceModel, deep: SourceModel, series: Sequence[Series], batches: Batches
) -> UpdateLikeness | None:
    """Returns how alike blocks are by what they add to the stream; None where that cannot be seen.

    Args:
        shallow: The network with fewer blocks.
        deep: The other.
        series: The blocks.
        batches: Inputs that both are run on.
    """
    ours = _updates(shallow, [path for row in series for path in row.shallow], batches)
    theirs = _updates(deep, [path for row in series for path in row.deep], batches)
    return None if ours is None or theirs is None else UpdateLikeness(ours, theirs)


def _updates(source: SourceModel, paths: Sequence[str], batches: Batches) -> dict[str, list[Gram]] | None:
    """Returns path → Gram matrices of what each block adds; None where a block is no module, or is not run once."""
    model = source.instance()
    modules = dict(model.named_modules())
    grams: dict[str, list[Gram]] = {path: [] for path in paths}
    if not grams.keys() <= modules.keys():
        return None

    def watch(path: str) -> None:
        def see(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            found = _update((*given, *named.values()), output)
            if found is not None:
                grams[path].append(_gram(found))

        modules[path].register_forward_hook(see, with_kwargs=True)

    for path in paths:
        watch(path)
    for batch in batches:
        with repeatable(0):
            model(*batch)
    return grams if {len(found) for found in grams.values()} == {len(batches)} else None


def _update(given: Sequence[Any], output: Any) -> Tensor | None:
    """Returns what a block adds to its first input of the output's shape; the output where none has it."""
    left = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(left, Tensor) or not left.is_floating_point():
        return None
    entered = next((value for value in given if isinstance(value, Tensor) and value.shape == left.shape), None)
    return left if entered is None else left - entered


def _gram(values: Tensor) -> Gram:
    """Returns the centred Gram matrix of samples, or of the positions of sequences."""
    rows = values.detach().double()
    rows = rows.flatten(0, 1) if rows.ndim == 3 else rows.flatten(1)
    rows = rows[:: max(1, len(rows) // _ROWS)]
    rows = rows - rows.mean(0)
    return rows @ rows.T


def _cka(ours: Sequence[Gram], theirs: Sequence[Gram]) -> float:
    """Returns the likeness of what two blocks add, from 0 to 1; of two that add nothing, 1."""
    inner, own, other = (
        sum(float((one * two).sum()) for one, two in zip(first, second, strict=True))
        for first, second in ((ours, theirs), (ours, ours), (theirs, theirs))
    )
    if own * other == 0.0:
        return float(own == other)
    return inner / (own * other) ** 0.5


def _distance(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Returns the mean squared difference of sorted norms, relative to their squares."""
    if [one.shape for one in ours] != [two.shape for two in theirs]:
        return 1.0  # of two kinds
    found = [float((one - two).square().sum()) for one, two in zip(ours, theirs, strict=True)]
    scale = [float(one.square().sum() + two.square().sum()) for one, two in zip(ours, theirs, strict=True)]
    return sum(apart / size if size else 0.0 for apart, size in zip(found, scale, strict=True)) / max(len(found), 1)


def _of_places(own: int, other: int) -> Float[Tensor, "own other"]:
    """Returns the squared distance of the middles of blocks, in rows of length one."""
    ours, theirs = ((torch.arange(count, dtype=torch.float64) + 0.5) / count for count in (own, other))
    return (ours[:, None] - theirs[None]).square()
