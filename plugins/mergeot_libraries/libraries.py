"""Networks of two libraries of vision models, built without weights: those of the checkpoints count."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from mergekit_ot import ArchitectureError
from mergekit_ot.errors import unknown_name

# Names that say where weights come from; the second library has several, one for each part of a network.
_TIMM_WEIGHTS = ("pretrained", "checkpoint_path", "cache_dir")


def timm_network(name: str, **arguments: Any) -> nn.Module:
    """Builds a network of timm; nothing is downloaded.

    Args:
        name: As ``timm.list_models()`` has it, with or without the tag of a set of weights.
        **arguments: Keywords of ``timm.create_model``, such as ``num_classes``.

    Raises:
        ArchitectureError: timm is not installed, has no such network, or weights are asked for.
    """
    timm = _imported("timm", "timm")
    _check_no_weights("timm", {key: value for key, value in arguments.items() if key in _TIMM_WEIGHTS})
    # A network of the Hub is described there, and would be looked up.
    if ":" in name or "/" in name:
        raise ArchitectureError(
            f"'timm:{name}' is described on a server, and mergeot downloads nothing. Name one of timm's own networks, "
            "or pass --arch nets.py:net with a function that builds it."
        )
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        raise ArchitectureError(_unknown("timm", name, known))
    kept = {key: value for key, value in arguments.items() if key not in _TIMM_WEIGHTS}
    return timm.create_model(name, pretrained=False, **kept)


def torchvision_network(name: str, **arguments: Any) -> nn.Module:
    """Builds a network of torchvision, for detection and segmentation too; nothing is downloaded.

    Args:
        name: As ``torchvision.models.list_models()`` has it.
        **arguments: Keywords of its builder, such as ``num_classes``.

    Raises:
        ArchitectureError: torchvision is not installed, has no such network, or weights are asked for.
    """
    models = _imported("torchvision.models", "torchvision")
    given = {key: value for key, value in arguments.items() if key.startswith("weights") or key == "pretrained"}
    _check_no_weights("torchvision", given)
    known = models.list_models()
    if name.lower() not in known:
        raise ArchitectureError(_unknown("torchvision", name, known))
    # The backbone of a detector has weights of its own, which would be downloaded by default.
    takes = _parameters(models.get_model_builder(name.lower()))
    none = {key: None for key in ("weights", "weights_backbone") if key in takes}
    kept = {key: value for key, value in arguments.items() if key not in given}
    return models.get_model(name.lower(), **none, **kept)


def _imported(module: str, distribution: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as missing:
        if missing.name != distribution:
            raise
        raise ArchitectureError(
            f"'{distribution}:' names a network of {distribution}, which is not installed. Install it: "
            f"pip install 'mergekit-ot[{distribution}]', or pip install {distribution}."
        ) from missing


def _check_no_weights(library: str, given: dict[str, object]) -> None:
    asked = {key: value for key, value in given.items() if value is not None and value is not False and value != ""}
    for key, value in asked.items():
        raise ArchitectureError(
            f"{key}={value} asks {library} for weights, and those of the checkpoints are the ones that are fused: "
            f"mergeot downloads none. Leave {key} out, or save that network with torch.save and name the file."
        )


def _parameters(builder: Callable[..., Any]) -> Iterable[str]:
    return inspect.signature(builder).parameters


def _unknown(library: str, name: str, known: list[str]) -> str:
    sentence = unknown_name(f"network of {library}", name, known)
    # They are hundreds.
    return f"{sentence.partition(' Known: ')[0]} It has {len(known)}: {library}.{_LISTING[library]} names them."


_LISTING = {"timm": "list_models()", "torchvision": "models.list_models()"}
