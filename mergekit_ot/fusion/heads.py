"""The heads of all sources in one network: the layers that make the outputs stand beside each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from mergekit_ot.errors import RecipeError
from mergekit_ot.fusion.alignment import Alignment
from mergekit_ot.fusion.moving import transport_parameter
from mergekit_ot.fusion.own_heads import with_sizes
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.layouts import Fixed, layout_size
from mergekit_ot.graph.mismatch import OUTPUT

# Head parameter → the axis along which outputs stand.
Heads = Mapping[str, int]


def head_parameters(graph: ModelGraph) -> dict[str, int]:
    """Returns the parameters that make a network's outputs, each with the axis along which outputs stand.

    Raises:
        RecipeError: There are none, one is tied to another layer, or its outputs are made of several factors.

    Example:
        >>> from mergekit_ot import trace_model
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> head_parameters(trace_model(net, torch.randn(2, 4)))
        {'2.weight': 0, '2.bias': 0}
    """
    # What other layers read as well is no head.
    made = {
        slot.parameter: slot.axis
        for group in graph.pinned_groups.values()
        if group.pin is not None and group.pin.operation == OUTPUT
        if not any(slot.is_reader for slot in group.members)
        for slot in group.members
    }
    heads = {name: made[name] for name in graph.layouts if name in made}
    tied = next((name for name in heads if name in graph.aliases.values()), None)
    odd = next((name for name, axis in heads.items() if not isinstance(graph.layouts[name][axis], Fixed)), None)
    if not heads:
        raise _refused("no layer makes the outputs alone")
    if tied is not None:
        raise _refused(f"'{tied}' makes the outputs and is tied to another layer")
    if odd is not None:
        raise _refused(f"the outputs of '{odd}' are reshaped")
    return heads


def with_all_heads(target: SourceModel, graphs: Sequence[ModelGraph], heads: Heads) -> SourceModel:
    """Returns the target with heads that hold those of all sources, one after the other.

    Args:
        target: Whose other sizes are taken.
        graphs: Of the sources.
        heads: What makes the outputs.
    """
    sizes = {}
    for name, axis in heads.items():
        shape = list(target.architecture.shapes[name].shape)
        shape[axis] = sum(_outputs(graph, name, axis) for graph in graphs)
        sizes[name] = tuple(shape)
    return with_sizes(target, sizes, {})


def check_heads(target: ModelGraph, graphs: Sequence[ModelGraph], heads: Heads) -> None:
    """Checks that the heads of all sources fit into the target beside each other.

    Raises:
        RecipeError: They do not.
    """
    for name, axis in heads.items():
        sizes, room = [_outputs(graph, name, axis) for graph in graphs], _outputs(target, name, axis)
        if sum(sizes) != room:
            raise _refused(
                f"'{name}' has {' + '.join(map(str, sizes))} = {sum(sizes)} outputs in the sources, and {room} in the "
                f"target. Give --target an architecture with {sum(sizes)}, or a model's place"
            )


def joined_head(name: str, axis: int, read: Callable[[int, str], Tensor], alignment: Alignment) -> Tensor:
    """Returns a head parameter with those of all aligned sources one after the other.

    Args:
        name: The parameter.
        axis: Along which outputs stand.
        read: Gives a parameter of a source.
        alignment: The couplings.
    """
    numbers = range(len(alignment.graphs))
    return torch.cat([transport_parameter(read(number, name), name, alignment, number) for number in numbers], axis)


def heads_note(names: Sequence[str], graphs: Sequence[ModelGraph], heads: Heads) -> str:
    """Returns a sentence that says whose outputs stand where.

    Args:
        names: Of the sources.
        graphs: Of the sources.
        heads: What makes the outputs.
    """
    parts, start = [], 0
    for name, size in zip(names, head_sizes(graphs, heads), strict=True):
        parts.append(f"{start} to {start + size - 1} are those of '{name}'")
        start += size
    shown = ", ".join(f"'{name}'" for name in heads)
    return f"The fused model has the heads of all models ({shown}), {start} outputs: {'; '.join(parts)}."


def head_sizes(graphs: Sequence[ModelGraph], heads: Heads) -> tuple[int, ...]:
    """Returns the number of outputs of every source, along the first of the heads.

    Args:
        graphs: Of the sources.
        heads: What makes the outputs.
    """
    first, axis = next(iter(heads.items()))
    return tuple(_outputs(graph, first, axis) for graph in graphs)


def _outputs(graph: ModelGraph, name: str, axis: int) -> int:
    return layout_size(graph.layouts[name][axis])


def _refused(why: str) -> RecipeError:
    return RecipeError(f"The heads of all models cannot be had (--head both): {why}. Or keep one with --keep.")


class MultiHead(nn.Module):
    """A network whose last layer holds several heads one after the other, with one output per head.

    What ``--head both`` writes is a state of the architecture with a wider last layer. Where the architecture takes the
    number of classes, it loads there, and gives the outputs of all heads side by side; here it loads into a network of
    any number of classes, and the outputs come apart.

    Args:
        network: An instance of the architecture, with any number of classes; its last layers are replaced.
        state: A state with the heads of all sources.
        sizes: Outputs of each head.
        axis: The axis of the network's output along which classes stand.

    Raises:
        RecipeError: The state holds another number of outputs.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> state = {**net.state_dict(), "2.weight": torch.randn(5, 8), "2.bias": torch.zeros(5)}
        >>> [outputs.shape[1] for outputs in MultiHead(net, state, sizes=(2, 3))(torch.randn(1, 4))]
        [2, 3]
    """

    def __init__(self, network: nn.Module, state: Mapping[str, Tensor], sizes: Sequence[int], axis: int = 1) -> None:
        super().__init__()
        self.network, self.sizes, self.axis = network, tuple(sizes), axis
        own = network.state_dict()
        for name, tensor in state.items():
            if name in own and own[name].shape != tensor.shape:
                if sum(sizes) not in tensor.shape:
                    raise RecipeError(
                        f"'{name}' has shape {tuple(tensor.shape)}, which does not hold {sum(sizes)} outputs "
                        f"(heads of {', '.join(map(str, sizes))})."
                    )
                path, _, last = name.rpartition(".")
                setattr(network.get_submodule(path), last, nn.Parameter(tensor.detach().clone()))
        network.load_state_dict(dict(state))

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Returns the outputs of every head."""
        return self.network(*inputs).split(self.sizes, self.axis)
