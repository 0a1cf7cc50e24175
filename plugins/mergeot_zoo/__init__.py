"""A few networks and a data set by name, so that a checkpoint can carry its architecture without carrying code."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ot import hookimpl


@hookimpl
def mergeot_architectures() -> Mapping[str, str]:
    """Returns the networks of this package by name."""
    modules = {"plain": ("mlp", "cnn", "vgg11"), "residual": ("resnet18", "resnet20", "resnet56")}
    networks: dict[str, str] = {}
    for module, names in modules.items():
        networks |= {name: f"mergeot_zoo.{module}:{name}" for name in names}
    return networks


@hookimpl
def mergeot_datasets() -> Mapping[str, str]:
    """Returns the data sets of this package by name."""
    return {"digits": "mergeot_zoo.digits:digits"}
