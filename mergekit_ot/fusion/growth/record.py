"""What became wider in a fused network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final


@final
@dataclass(frozen=True)
class Growth:
    """What became wider.

    Attributes:
        sizes: Group → neurons before and after, of those that grew.
        parameters: Parameters of the target before and after.

    Example:
        >>> Growth({"fc1.weight:0": (400, 500)}, (79510, 99385)).sentence[:70]
        'The fused network has 1.25 times the parameters of its target (99385 f'
    """

    sizes: Mapping[str, tuple[int, int]]
    parameters: tuple[int, int]

    def as_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return {"parameters": list(self.parameters), "sizes": {key: list(sizes) for key, sizes in self.sizes.items()}}

    @property
    def sentence(self) -> str:
        """What was done, for the reader."""
        before, after = self.parameters
        grown = ", ".join(f"{key.partition(':')[0]} {own} to {wide}" for key, (own, wide) in self.sizes.items())
        return (
            f"The fused network has {after / before:.3g} times the parameters of its target ({after} for {before}): "
            f"{grown or 'no layer grew'}. Load it with mergekit_ot.resized(network, state)."
        )
