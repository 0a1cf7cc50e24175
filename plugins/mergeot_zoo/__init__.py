"""A few networks and a data set by name, so that a checkpoint can carry its architecture without carrying code."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ot import hookimpl


@hookimpl
def mergeot_architectures() -> Mapping[str, str]:
    """Return the networks of this package by name."""
    return {
        "mlp": "mergeot_zoo.plain:mlp",
        "cnn": "mergeot_zoo.plain:cnn",
        "vgg11": "mergeot_zoo.plain:vgg11",
        "resnet18": "mergeot_zoo.residual:resnet18",
        "resnet20": "mergeot_zoo.residual:resnet20",
        "resnet56": "mergeot_zoo.residual:resnet56",
    }


@hookimpl
def mergeot_datasets() -> Mapping[str, str]:
    """Return the data sets of this package by name."""
    return {"digits": "mergeot_zoo.digits:digits"}
