"""Modules whose tied parameters are made separate ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import nn


def untied(make: Callable[[], nn.Module], aliases: Mapping[str, str]) -> Callable[[], nn.Module]:
    """Returns what gives fresh instances in which each name of a tied parameter holds a tensor of its own.

    Args:
        make: Gives a fresh instance each time.
        aliases: Further name of a tied parameter → its first name.

    Example:
        >>> def make():
        ...     net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        ...     net[1].weight = net[0].weight
        ...     return net
        >>> net = untied(make, {"1.weight": "0.weight"})()
        >>> net[1].weight is net[0].weight, bool((net[1].weight == net[0].weight).all())
        (False, True)
    """

    def make_untied() -> nn.Module:
        model = make()
        for name in aliases:
            path, _, attribute = name.rpartition(".")
            owner = model.get_submodule(path)
            tied = owner.get_parameter(attribute)
            owner.register_parameter(attribute, nn.Parameter(tied.detach().clone(), tied.requires_grad))
        return model

    return make_untied
