"""Node measures: what a neuron is seen by."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ot import hookimpl


@hookimpl
def mergeot_node_measures() -> Mapping[str, str]:
    """Return the measures by weights and by responses."""
    home = "mergeot_measures.measures"
    return {
        "weights": f"{home}:WeightsMeasure",
        "importance": f"{home}:ImportanceMeasure",
        "activations": f"{home}:ActivationsMeasure",
        "correlations": f"{home}:CorrelationsMeasure",
        "weights+activations": f"{home}:WeightsAndActivationsMeasure",
    }
