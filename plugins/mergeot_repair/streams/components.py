"""The fused stream: principal components of the sources' streams side by side (no alignment is needed)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mergeot_repair.streams.finding import Stream
from mergeot_repair.streams.proof import along, without_mean

_TINY = torch.finfo(torch.float64).tiny


class Components:
    """Inner products of the sources' streams side by side, summed over batches, at every point where they are read.

    Args:
        stream: Of the fused network.
        sizes: How many neurons the stream has in each source.
        shares: Each source's share in the fused network.
    """

    def __init__(self, stream: Stream, sizes: Sequence[int], shares: Sequence[float]) -> None:
        self.stream, self.sizes, self.shares = stream, list(sizes), list(shares)
        total = sum(sizes)
        self.grams = {point.source: torch.zeros(total, total, dtype=torch.float64) for point in stream.points}
        # Of what is read behind the norm and the stream before it, neuron by neuron: products, sums, squares.
        self.moments = {point.source: torch.zeros(5, total, dtype=torch.float64) for point in stream.points}

    def add(self, point: str, streams: Sequence[Tensor], read: Sequence[Tensor]) -> None:
        """Adds a batch: the sources' streams ``[place, neuron]`` at a point, and what is read of them there."""
        rows = torch.cat(list(streams), 1)
        if self.stream.turns.fixes_ones:
            rows = torch.cat([part - part.mean(1, keepdim=True) for part in streams], 1)
        self.grams[point] += rows.T @ rows
        behind = torch.cat(list(read), 1)
        ones = torch.full_like(rows, 1.0)
        for moment, (left, right) in zip(
            self.moments[point],
            ((rows, behind), (rows, ones), (behind, ones), (rows, rows), (ones, ones)),
            strict=True,
        ):
            moment += (left * right).sum(0, dtype=torch.float64)

    def links(self) -> list[Float[Tensor, "fused neuron"]]:
        """Returns the matrices that lead from each source's stream to the fused one; their images are added.

        Behind LayerNorm a stream's mean says nothing, and becomes the fused stream's: what reads an embedding that is
        tied may need it.
        """
        # As large as the streams are: a factor for each source of its own fits worse (decision 24).
        factors = [share**0.5 for share in self.shares]
        sides = torch.cat([torch.full((size,), factor) for size, factor in zip(self.sizes, factors, strict=True)])
        gram = torch.zeros_like(next(iter(self.grams.values())))
        for of_point in self.grams.values():
            scaled = sides[:, None] * of_point * sides
            gram += scaled / scaled.trace().clamp_min(_TINY)
        width = self.stream.size
        basis = without_mean(width) if self.stream.turns.fixes_ones else torch.eye(width, dtype=torch.float64)
        components = self._components(gram, basis.shape[1])
        joint = basis[:, : len(components)] @ self._near_own_axes(components, basis) * sides
        links = list(joint.split(self.sizes, 1))
        if self.stream.turns.fixes_ones:
            links = [
                link - link.mean(1, keepdim=True) + factor**2 / link.numel() ** 0.5
                for link, factor in zip(links, factors, strict=True)
            ]
        return links

    def own_grams(self, point: str) -> list[Float[Tensor, "neuron neuron"]]:
        """Returns the inner products of each source's stream with itself at a point."""
        grams, start = [], 0
        for size in self.sizes:
            grams.append(self.grams[point][start : start + size, start : start + size])
            start += size
        return grams

    def _components(self, gram: Float[Tensor, "side side"], most: int) -> Float[Tensor, "component side"]:
        if len(self.sizes) == 1 and self.sizes[0] == self.stream.size:
            # Of one source any turn is as good as any other: its own axes stay.
            full = torch.eye(self.sizes[0], dtype=torch.float64)
            return without_mean(self.sizes[0]).T if self.stream.turns.fixes_ones else full
        _, vectors = torch.linalg.eigh(gram)
        components = vectors.flip(1).T[:most]
        # An eigenvector is known up to its sign.
        largest = components.gather(1, components.abs().argmax(1, keepdim=True))
        return components * largest.sign()

    def _near_own_axes(
        self, components: Float[Tensor, "component side"], basis: Float[Tensor, "fused inner"]
    ) -> Float[Tensor, "component side"]:
        """Returns the components turned so that the fused neurons are as near to the sources' own as they can be."""
        width, count = self.stream.size, len(components)
        total = torch.zeros(count, count, dtype=torch.float64)
        for part, factor in zip(components.split(self.sizes, 1), self.shares, strict=True):
            if part.shape[1] == width:
                total += factor * part @ basis[:, :count]
        if not bool(total.any()):
            return components
        left, _, right = torch.linalg.svd(total)
        return right.T @ left.T @ components

    def gains(self, point: str) -> list[Float[Tensor, " neuron"]]:
        """Returns by how much each neuron of each source's stream is multiplied in what is read at a point."""
        product, stream, behind, square, count = self.moments[point]
        covariance = product - stream * behind / count
        variance = (square - stream**2 / count).clamp_min(_TINY)
        return list((covariance / variance).split(self.sizes))


def linked(values: Sequence[Tensor], links: Sequence[Float[Tensor, "fused neuron"]], axis: int) -> Tensor:
    """Returns what the fused stream holds where each source's holds some values, neurons along an axis."""
    images = [along(value, axis, link.to(value.dtype)) for value, link in zip(values, links, strict=True)]
    return torch.stack(images).sum(0)
