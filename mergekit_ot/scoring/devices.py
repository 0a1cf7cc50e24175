"""The device that networks are run on."""

from __future__ import annotations

import torch

from mergekit_ot.errors import RecipeError


def choose_device(name: str) -> torch.device:
    """Returns the device for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        RecipeError: The device does not exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"Unknown device '{name}'. Use auto, cpu or cuda.") from error
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"Unknown device '{name}'. Use auto, cpu or cuda.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RecipeError("This machine has no CUDA device. Use --device cpu or --device auto.")
    return device
