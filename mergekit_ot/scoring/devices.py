"""The device that networks are run on."""

from __future__ import annotations

import torch

from mergekit_ot.errors import RecipeError

_KNOWN = ("cpu", "cuda", "mps")


def choose_device(name: str) -> torch.device:
    """Returns the device for ``auto`` (CUDA where there is some), ``cpu``, ``cuda`` or ``mps``.

    Raises:
        RecipeError: The device does not exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"Unknown device '{name}'. Use auto, cpu, cuda or mps.") from error
    if device.type not in _KNOWN:
        raise RecipeError(f"Unknown device '{name}'. Use auto, cpu, cuda or mps.")
    if device.type == "cuda":
        _check_cuda(device)
    if device.type == "mps" and not torch.backends.mps.is_available():
        why = "needs macOS 14 and a GPU of Apple" if torch.backends.mps.is_built() else "is not in this build of torch"
        raise RecipeError(f"This machine has no MPS device: MPS {why}. Use --device cpu or --device auto.")
    return device


def _check_cuda(device: torch.device) -> None:
    if not torch.cuda.is_available():
        why = "" if torch.backends.cuda.is_built() else " (and this build of torch is without CUDA)"
        raise RecipeError(f"This machine has no CUDA device{why}. Use --device cpu or --device auto.")
    if device.index is not None and device.index >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise RecipeError(f"This machine has {count} CUDA devices, cuda:0 to cuda:{count - 1}: there is no '{device}'.")


def has_double(device: torch.device) -> bool:
    """Whether a device computes in double precision.

    Example:
        >>> has_double(torch.device("cpu"))
        True
    """
    return device.type != "mps"
