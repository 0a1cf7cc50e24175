"""Transport of tensors by couplings that are given: families inside softly coupled groups."""

from __future__ import annotations

import pytest
import torch
from nets import Grouped
from torch import Tensor, nn

from mergekit_ot import Coupling, Permutation, Plan, trace_model
from mergekit_ot.fusion.alignment import Alignment, FamilyCoupling
from mergekit_ot.fusion.moving import transport_parameter
from mergekit_ot.graph.layouts import IN, OUT

INPUTS = torch.randn(2, 2, 8, 8, dtype=torch.float64)
# Which group of three each of six groups is a copy of, in an order that is not sorted.
COPY_OF = torch.tensor([1, 0, 2, 2, 1, 0])


def grouped_pair() -> tuple[nn.Module, nn.Module, dict[str, dict[int, Tensor]]]:
    """A net of three groups, and one of six that are copies of them with their neurons reordered inside."""
    small, large = Grouped(3).double(), Grouped(6).double()
    generator = torch.Generator().manual_seed(0)
    inside = {
        name: {k: torch.randperm(size, generator=generator) for k in range(6)} for name, size in (("a", 4), ("b", 5))
    }
    for tensor in small.state_dict().values():
        tensor.normal_(generator=generator)
    rows = {
        name: torch.cat([COPY_OF[k] * size + inside[name][k] for k in range(6)]) for name, size in (("a", 4), ("b", 5))
    }
    state = {key: value.clone() for key, value in small.state_dict().items()}
    for key in ("conv1.weight", "conv1.bias", "norm.weight", "norm.bias"):
        state[key] = state[key][rows["a"]]
    state["conv2.bias"] = state["conv2.bias"][rows["b"]]
    copied = state["conv2.weight"][rows["b"]]
    state["conv2.weight"] = torch.cat([copied[5 * k : 5 * k + 5][:, inside["a"][k]] for k in range(6)])
    state["head.weight"] = state["head.weight"][:, rows["b"]] / 2
    large.load_state_dict(state)
    return small, large, inside


def families(inside: dict[int, Tensor]) -> FamilyCoupling:
    """Member (fused group, source group): where the neurons of the fused group stand in the copy."""
    return FamilyCoupling({((int(COPY_OF[k]), k),): Permutation(torch.argsort(inside[k])) for k in range(len(COPY_OF))})


@pytest.mark.parametrize("sources", ["small first", "large first"])
def test_copies_of_whole_groups_fuse_back_exactly(sources: str) -> None:
    small, large, inside = grouped_pair()
    torch.testing.assert_close(large(INPUTS), small(INPUTS), rtol=0, atol=1e-12)
    graphs = [trace_model(model, INPUTS) for model in (small, large)]
    models = [small, large]
    if sources == "large first":
        graphs, models = graphs[::-1], models[::-1]
    target = graphs[models.index(small)]
    outer = next(key for key, group in target.free_groups.items() if not group.context)
    plan = torch.nn.functional.one_hot(COPY_OF, 3).T.double() / 6
    found: dict[int, dict[str, Coupling | FamilyCoupling]] = {0: {}, 1: {}}
    for number, model in enumerate(models):
        for key, group in target.free_groups.items():
            if model is large:
                mine = families(inside["a" if group.size == 4 else "b"]) if group.context else Plan(plan)
            elif group.context:
                mine = FamilyCoupling({((j, j),): Permutation.identity(group.size) for j in range(3)})
            else:
                mine = Permutation.identity(3)
            found[number][key] = mine
    couplings = {key: (found[0][key], found[1][key]) for key in target.free_groups}
    assert outer in couplings
    assert len(couplings) == 3
    alignment = Alignment(tuple(graphs), target, couplings)
    for number, model in enumerate(models):
        for name, tensor in model.state_dict().items():
            moved = transport_parameter(tensor, name, alignment, number)
            torch.testing.assert_close(moved, small.state_dict()[name], rtol=0, atol=1e-12, msg=f"{number} {name}")


def test_owners_are_averaged_and_readers_split() -> None:
    """Two source neurons go to the first fused one, one to the second."""
    coupling = Plan(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]) / 3)
    tensor = torch.tensor([2.0, 4.0, 7.0])
    assert torch.allclose(coupling.move(tensor, 0, reads=False), torch.tensor([3.0, 7.0]))
    assert torch.allclose(coupling.move(tensor, 0, reads=True), torch.tensor([6.0, 7.0]))


@pytest.mark.parametrize("role", [IN, OUT])
def test_a_permutation_is_a_gather_along_its_dimension(role: str) -> None:
    tensor, order = torch.randn(2, 4, 3), torch.tensor([2, 0, 3, 1])
    moved = Permutation(order).move(tensor, 1, role == IN)
    assert torch.equal(moved, tensor[:, order])
    plan = Plan(Permutation(order).transport_plan())
    torch.testing.assert_close(plan.move(tensor, 1, role == IN), moved)
