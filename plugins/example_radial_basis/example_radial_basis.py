"""A layer of radial basis functions, and the rule that says where its neurons are: an example of a plugin.

The layer calls an operation of its own, for which `mergeot` has no rule. The rule here is for the whole module,
whatever its forward calls.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from mergekit_ot import EinRule, NodeRule, hookimpl


@torch.library.custom_op("radial_basis::distances", mutates_args=())
def distances(values: Tensor, centres: Tensor) -> Tensor:
    """Returns how far values ``(…, inputs)`` are from centres ``(neurons, inputs)``; a fast kernel would stand here."""
    return torch.cdist(values, centres)


@distances.register_fake
def _(values: Tensor, centres: Tensor) -> Tensor:
    return values.new_empty(*values.shape[:-1], len(centres))


class RadialBasis(nn.Module):
    """Neurons that answer to the distance from their centres, each with a width of its own.

    Attributes:
        centres: One row per neuron, ``(neurons, inputs)``.
        log_widths: Logarithm of the distance at which a neuron's answer has fallen to 1/e, ``(neurons,)``.
    """

    def __init__(self, inputs: int, neurons: int) -> None:
        super().__init__()
        self.centres = nn.Parameter(torch.randn(neurons, inputs))
        self.log_widths = nn.Parameter(torch.zeros(neurons))

    def forward(self, values: Tensor) -> Tensor:
        """Returns ``(…, neurons)`` for values ``(…, inputs)``."""
        relative = distances(values, self.centres) / self.log_widths.exp()
        return torch.exp(-relative.square())


# Values and centres share their last axis, which is summed over; every neuron has one centre and one width.
RADIAL_BASIS = EinRule("... i; c i; c -> ... c", ("input0", "centres", "log_widths"))


@hookimpl
def mergeot_node_rules() -> Mapping[str, NodeRule | str]:
    """Return the rule of the module, by the name of its class."""
    return {"module:RadialBasis": RADIAL_BASIS}


def radial(inputs: int = 4, hidden: int = 6, neurons: int = 5, outputs: int = 3) -> nn.Module:
    """Builds a linear layer, a radial basis of its neurons, and a linear layer.

    Args:
        inputs: Inputs of the network.
        hidden: Neurons of the first layer.
        neurons: Neurons of the radial basis.
        outputs: Outputs of the network.
    """
    first, last = nn.Linear(inputs, hidden), nn.Linear(neurons, outputs)
    return nn.Sequential(OrderedDict(first=first, basis=RadialBasis(hidden, neurons), last=last))


@hookimpl
def mergeot_architectures() -> Mapping[str, Callable[..., nn.Module] | str]:
    """Return the network by name, for ``--arch radial?neurons=9``."""
    return {"radial": radial}
