"""One source alone in the place of the fused network, where it is the better one by what can be seen without labels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mergekit_ot.fusion.comparison import RepairComparison
from mergekit_ot.fusion.repair import AlignedModels


@dataclass(frozen=True)
class Fallback:
    """What is written where the user asks for the better of the fused network and the sources.

    Attributes:
        note: What is written, and why.
        source: Place of the source that is written alone; None for the fused network.
        state: Its state.
    """

    note: str
    source: int | None = None
    state: Mapping[str, Tensor] | None = None


def chosen(comparison: RepairComparison | None, models: AlignedModels, template: Mapping[str, Tensor]) -> Fallback:
    """Returns the source that alone is surely nearer to the ensemble, or the fused network.

    Args:
        comparison: How near the networks are; None where they could not be compared.
        models: The networks of the fusion.
        template: State dict of the fused architecture.
    """
    if comparison is None:
        return Fallback("The fused network is written: it could not be compared with the sources (--fallback).")
    alone = comparison.nearer_source
    if alone is None:
        return Fallback("The fused network is written: no source alone is surely nearer to the ensemble (--fallback).")
    own = models.given[alone].state
    if any(name not in own or own.shape(name) != tensor.shape for name, tensor in template.items()):
        return Fallback(
            f"The fused network is written, since source number {alone + 1} has other sizes and cannot stand in for it "
            "(--fallback). Use that source itself, or give --target its place."
        )
    state = {name: own.read(name).to(tensor.dtype) for name, tensor in template.items()}
    return Fallback(f"Source number {alone + 1} alone is written, as it is (--fallback).", alone, state)
