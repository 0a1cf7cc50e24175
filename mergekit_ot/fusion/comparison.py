"""What a repair is worth, without labels: on inputs that it was not fitted to, is it nearer to the sources together?"""

from __future__ import annotations

from dataclasses import dataclass

from mergekit_ot.fusion.options import NO_REPAIR
from mergekit_ot.fusion.predictions import Aim

# A fused network that is so near to the ensemble computes it: nothing is left to repair.
_NOTHING_LEFT = 1e-9


@dataclass(frozen=True)
class Distance:
    """How far a network's outputs are from those of the ensemble of the sources, as shares of how much these vary.

    Attributes:
        plain: Of the outputs as they stand.
        scaled: Of the outputs when all are scaled by the one number that brings them nearest, what all classes of a
            sample share left out: what matters where only the largest output counts, as in classification.
    """

    plain: float
    scaled: float

    def is_no_farther(self, other: Distance) -> bool:
        """Whether neither distance is larger than the other's; one that is not finite is."""
        return self.plain <= other.plain and self.scaled <= other.scaled

    def __str__(self) -> str:
        return f"{self.plain:.3g}, {self.scaled:.3g} up to scale"


@dataclass(frozen=True)
class Closeness:
    """How near the predictions of a classifier are to those of the ensemble, the mean probabilities of the sources.

    Attributes:
        divergence: Mean Kullback-Leibler divergence, in nats.
        agreement: Percent of the inputs for which the answer is the same.
    """

    divergence: float
    agreement: float

    def __str__(self) -> str:
        return f"{self.divergence:.3g} nats, {self.agreement:.1f} % of the answers equal"


@dataclass(frozen=True)
class RepairComparison:
    """A repaired network beside the unrepaired one and the sources, on calibration inputs that were held out.

    Attributes:
        repair: Name of the repair.
        held_out: How many inputs were held out.
        repaired: Distance of the repaired network from the ensemble of the sources.
        unrepaired: Distance of the fused network without the repair.
        sources: Distance of each source.
        is_one_sided: Whether the ensemble takes all held-out inputs for one class of several.
        aim: What the repair brings the results near to.
        predictions: For classifiers, the same of their predictions: of the repaired network, of the unrepaired one,
            and of each source. Empty where the results are no classes.
        nearer_sources: Place of the source that alone is surely nearer to the ensemble than the repaired network, and
            than the unrepaired one; None where there is none. Of classifiers the divergence counts, of other networks
            the squared distance of the outputs; the mean difference over the held-out inputs has to be more than two
            standard errors.
        mean: Distance of the mean of the sources' weights, neurons taken as they stand; None where sizes differ.
        prediction_of_mean: For classifiers, the same of its predictions.
        is_mean_nearer: Whether that mean is surely nearer than the repaired network, and than the unrepaired one.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from mergekit_ot import fuse
        >>> nets = [nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)) for _ in range(2)]
        >>> found = fuse(nets, data=[torch.randn(200, 4)], repair="refit").repair_comparison
        >>> found.is_written == found.repaired.is_no_farther(found.unrepaired)
        True
    """

    repair: str
    held_out: int
    repaired: Distance
    unrepaired: Distance
    sources: tuple[Distance, ...]
    is_one_sided: bool = False
    aim: Aim = Aim.OUTPUTS
    predictions: tuple[Closeness, ...] = ()
    nearer_sources: tuple[int | None, int | None] = (None, None)
    mean: Distance | None = None
    prediction_of_mean: Closeness | None = None
    is_mean_nearer: tuple[bool, bool] = (False, False)

    @property
    def is_needed(self) -> bool:
        """Whether the fused network differs from the ensemble at all without the repair."""
        return not self.unrepaired.plain <= _NOTHING_LEFT

    @property
    def is_written(self) -> bool:
        """Whether the repaired network is the result; else it is the one without the repair."""
        if self.aim is Aim.PROBABILITIES and self.predictions:
            repaired, unrepaired, *_ = self.predictions
            return repaired.divergence <= unrepaired.divergence or repaired.agreement > unrepaired.agreement
        return self.is_needed and self.repaired.is_no_farther(self.unrepaired)

    @property
    def nearer_source(self) -> int | None:
        """Place of the source that alone is nearest to the ensemble, where it is surely nearer than the result."""
        return self.nearer_sources[0 if self.is_written else 1]

    @property
    def sentence(self) -> str:
        """What was measured, in words."""
        said = (
            f"Distance from the ensemble of the sources on {self.held_out:,} held-out calibration inputs: "
            f"{self._beside(self.repaired, self.unrepaired)}"
        )
        if not self.sources:
            return f"{said}."
        nearest = min(range(len(self.sources)), key=lambda number: self.sources[number].plain)
        of_mean = self._of_mean(self.mean, self.unrepaired)
        own = f"{self.sources[nearest]} for the nearest source (number {nearest + 1})"
        return f"{said}; {own}{of_mean}.{self._of_predictions}"

    @staticmethod
    def _of_mean(mean: object, unrepaired: object) -> str:
        # Where nothing was aligned, the fused network is that mean.
        return "" if mean is None or mean == unrepaired else f"; {mean} for the plain mean of their weights"

    def _beside(self, repaired: object, unrepaired: object) -> str:
        if self.repair == NO_REPAIR:
            return f"{unrepaired} for the fused network"
        return f"{repaired} with the repair; {unrepaired} without"

    @property
    def _of_predictions(self) -> str:
        if not self.predictions:
            return ""
        repaired, unrepaired, *sources = self.predictions
        nearest = min(range(len(sources)), key=lambda number: sources[number].divergence)
        return (
            f" Of its predictions: {self._beside(repaired, unrepaired)}; {sources[nearest]} for the nearest source "
            f"(number {nearest + 1}){self._of_mean(self.prediction_of_mean, unrepaired)}."
        )

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the user has to know."""
        found = []
        if self.is_needed and not self.is_written:
            found.append(
                f"The repair '{self.repair}' is NOT in the result: on calibration inputs that it was not fitted to, "
                "the network is farther from its sources with it than without, so the result is without. "
                f"{self.sentence} Give more calibration data (--data, --calibration-size), as the sources were trained "
                "on, or --repair none."
            )
        if self.is_written and self.is_one_sided:
            found.append(
                f"The sources take all {self.held_out:,} held-out calibration inputs for the same class: a repair "
                "learns little about the others from such data. Give inputs of all classes with --data."
            )
        alone = self.nearer_source
        if alone is not None:
            found.append(
                f"Source number {alone + 1} alone is nearer to the ensemble of all sources than the fused network, so "
                f"it may be the better network. {self.sentence}"
            )
        if self.is_mean_nearer[0 if self.is_written else 1]:
            found.append(
                "The plain mean of the sources' weights is nearer to their ensemble than the fused network: they may "
                f"come from one training. Compare with --solver average. {self.sentence}"
            )
        return tuple(found)

    def as_json(self) -> dict[str, object]:
        """Returns plain numbers, for a file or a terminal."""
        return {
            "name": self.repair,
            "written": self.is_written,
            "held_out": self.held_out,
            "distance": vars(self.repaired),
            "distance_without": vars(self.unrepaired),
            "distances_of_sources": [vars(distance) for distance in self.sources],
            "aim": self.aim.value,
            "nearer_source": self.nearer_source,
            "distance_of_mean": None if self.mean is None else vars(self.mean),
            **self._predictions_as_json(),
        }

    def _predictions_as_json(self) -> dict[str, object]:
        if not self.predictions:
            return {}
        repaired, unrepaired, *sources = map(vars, self.predictions)
        found = {"predictions": repaired, "predictions_without": unrepaired, "predictions_of_sources": sources}
        return (
            found
            if self.prediction_of_mean is None
            else {**found, "predictions_of_mean": vars(self.prediction_of_mean)}
        )
