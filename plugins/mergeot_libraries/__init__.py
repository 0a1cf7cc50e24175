"""Architectures of timm and torchvision by their names: ``timm:resnet18``, ``torchvision:resnet50?num_classes=10``."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ot import hookimpl


@hookimpl
def mergeot_architecture_libraries() -> Mapping[str, str]:
    """Returns the libraries by the prefix of a SPEC."""
    return {name: f"mergeot_libraries.libraries:{name}_network" for name in ("timm", "torchvision")}
