"""Small networks and a data set by name: ``--arch mlp?sizes=64-32-10``, ``--data digits``."""

from __future__ import annotations

from mergekit_ot import hookimpl


@hookimpl
def mergeot_architectures() -> dict[str, str]:
    """Registers ``mlp``, ``cnn``, ``vgg11`` and ``resnet20``."""
    return {
        "mlp": "mergeot_zoo.networks:mlp",
        "cnn": "mergeot_zoo.networks:cnn",
        "vgg11": "mergeot_zoo.networks:vgg11",
        "resnet20": "mergeot_zoo.resnet:resnet20",
    }


@hookimpl
def mergeot_datasets() -> dict[str, str]:
    """Registers ``digits``."""
    return {"digits": "mergeot_zoo.digits:digits"}
