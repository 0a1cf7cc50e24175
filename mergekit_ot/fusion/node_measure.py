"""What a node measure is: it describes the neurons of a group in every source."""

from __future__ import annotations

import abc

from mergekit_ot.fusion.group_view import GroupView
from mergekit_ot.transport.measure import NeuronMeasure


class AbstractNodeMeasure(abc.ABC):
    """Describes the neurons of a group in every source as measures with a common support space.

    Attributes:
        needs_data: Whether calibration data are needed.

    Example:
        A neuron is the direction of its weights, however long they are:

        >>> import copy
        >>> import torch
        >>> from types import SimpleNamespace
        >>> from torch.nn.functional import normalize
        >>> from mergekit_ot import PluginManager, fuse, hookimpl
        >>> class Direction(AbstractNodeMeasure):
        ...     def measure(self, view):
        ...         rows = [normalize(view.weights(source)) for source in range(view.count)]
        ...         return tuple(NeuronMeasure.uniform(support) for support in rows)
        >>> manager = PluginManager.load()
        >>> hook = hookimpl(lambda: {"direction": Direction})
        >>> manager.register(SimpleNamespace(mergeot_node_measures=hook), "mine")
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> louder = copy.deepcopy(net)
        >>> louder[0].weight.data *= 3
        >>> inputs = torch.randn(2, 4)
        >>> result = fuse([net, louder], solver="wb", measure="direction", example_inputs=inputs, manager=manager)
        >>> result.groups[0].cost < 1e-6
        True
    """

    needs_data: bool = False

    @abc.abstractmethod
    def measure(self, view: GroupView) -> tuple[NeuronMeasure, ...]:
        """Returns one measure per source; all supports have the same number of columns."""
