"""What is measured and drawn between two models, as plain records."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_ot.scoring.path import BarrierCurve
from mergekit_ot.scoring.plane import LossPlane


@dataclass(frozen=True)
class Pictures:
    """What is drawn: the curves, and the plane with so many points per side."""

    curves: Path | None = None
    plane: Path | None = None
    plane_points: int = 21

    @property
    def paths(self) -> list[Path]:
        """The files that are written."""
        return [path for path in (self.curves, self.plane) if path is not None]


@dataclass(frozen=True)
class Connectivity:
    """How two models are connected; what was not asked for is None.

    Attributes:
        naive: The path between the models as they are.
        aligned: The path after alignment.
        naive_repaired: The naive path with the repair at every point between its ends.
        aligned_repaired: The aligned path with the repair at every point between its ends.
        plane: The plane through A, B and aligned B.
        solver: What aligned them.
        repair: What repaired them.
    """

    naive: BarrierCurve
    aligned: BarrierCurve | None
    naive_repaired: BarrierCurve | None
    aligned_repaired: BarrierCurve | None
    plane: LossPlane | None
    solver: str
    repair: str

    def as_json(self) -> dict[str, Any]:
        """Returns the object of ``mergeot barrier --json``."""
        content: dict[str, Any] = {**self.naive, "aligned": self.aligned}
        if self.naive_repaired is not None:
            content["repaired"] = {**self.naive_repaired, "aligned": self.aligned_repaired}
        if self.plane is not None:
            content["plane"] = self.plane
        return content

    def curves(self) -> dict[str, BarrierCurve]:
        """Returns the curves there are, by what a picture calls them."""
        labelled = {
            "naive": self.naive,
            f"naive + {self.repair}": self.naive_repaired,
            f"aligned ({self.solver})": self.aligned,
            f"aligned ({self.solver}) + {self.repair}": self.aligned_repaired,
        }
        return {label: curve for label, curve in labelled.items() if curve is not None}
