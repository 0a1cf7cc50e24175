"""Networks whose layers have other sizes than their code says: layers read their sizes off their weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mergekit_ot.errors import ArchitectureError

# What layers call the axes of their weights; only shown, and written into programs.
_NAMED_SIZES: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Linear: ("out_features", "in_features"),
    nn.Conv1d: ("out_channels", "in_channels"),
    nn.Conv2d: ("out_channels", "in_channels"),
    nn.Conv3d: ("out_channels", "in_channels"),
    nn.BatchNorm1d: ("num_features",),
    nn.BatchNorm2d: ("num_features",),
    nn.BatchNorm3d: ("num_features",),
}


def resized(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Returns a network with its layers in the sizes of a state, which it holds: what loads a widened network.

    Linear layers, convolutions and BatchNorm compute with whatever sizes their weights have. So a state with wider
    hidden layers, as ``mergeot fuse --widen`` writes, needs no code of its own.

    Args:
        model: A network of the architecture, of any widths; it is changed and returned.
        state: Parameters and buffers under the names of the architecture.

    Raises:
        ArchitectureError: A name is missing or unknown, or a tensor has another number of axes.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> wide = nn.Sequential(nn.Linear(4, 11), nn.ReLU(), nn.Linear(11, 2))
        >>> resized(net, wide.state_dict())
        Sequential(
          (0): Linear(in_features=4, out_features=11, bias=True)
          (1): ReLU()
          (2): Linear(in_features=11, out_features=2, bias=True)
        )
        >>> bool(torch.equal(net(torch.ones(1, 4)), wide(torch.ones(1, 4))))
        True
    """
    own = model.state_dict()
    odd = sorted(own.keys() ^ state.keys())
    odd = [name for name in odd if not name.endswith("num_batches_tracked")]
    if odd:
        raise ArchitectureError(f"'{odd[0]}' is in the network or in the state, and not in both: is it this network's?")
    take_sizes(model, {name: tensor.shape for name, tensor in state.items() if name in own})
    model.load_state_dict(dict(state), strict=False)
    return model


def take_sizes(model: nn.Module, shapes: Mapping[str, torch.Size]) -> None:
    """Gives the parameters and buffers of a network other shapes; tied ones stay one tensor.

    Args:
        model: The network; it is changed, and its tensors are zero where their shape was another.
        shapes: Name → shape.

    Raises:
        ArchitectureError: A tensor has another number of axes.
    """
    made: dict[int, Tensor] = {}
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for name, shape in shapes.items():
        tensor = held[name]
        if tensor.shape == shape:
            continue
        if tensor.ndim != len(shape):
            raise ArchitectureError(
                f"'{name}' has {tensor.ndim} axes in the network and {len(shape)} in the state: is it this network's?"
            )
        path, _, last = name.rpartition(".")
        if id(tensor) not in made:
            empty = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        setattr(model.get_submodule(path), last, made[id(tensor)])
    for module in model.modules():
        for kind, names in _NAMED_SIZES.items():
            if type(module) is kind and isinstance(module.weight, Tensor):
                for name, size in zip(names, module.weight.shape, strict=False):
                    setattr(module, name, size)
