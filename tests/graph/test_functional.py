"""Programs without in-place writes: the quick way gives what torch's own does."""

from __future__ import annotations

import pytest
import torch
from architectures import PLAIN, names, samples
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from mergekit_ot.graph.capture import functional as module
from mergekit_ot.graph.capture.capture import prepared
from mergekit_ot.graph.capture.inputs import traced_inputs


class Conditional(nn.Module):
    """Composite operations inside a condition, and a write in place."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        hidden[:, 0] = 0.0
        chosen = torch.cond(hidden.sum() > 0, lambda x: self.last(x), lambda x: self.last(torch.relu(x)), (hidden,))
        return torch.einsum("bi->ib", chosen)


def exported(model: nn.Module, inputs: tuple[object, ...]) -> ExportedProgram:
    return torch.export.export(prepared(model), traced_inputs(model, inputs), strict=False)


def is_same(one: ExportedProgram, other: ExportedProgram) -> bool:
    texts = [
        [str(part.graph) for part in each.graph_module.modules() if isinstance(part, fx.GraphModule)]
        for each in (one, other)
    ]
    return texts[0] == texts[1] and one.graph_signature == other.graph_signature


# The others cannot be exported, or are many.
_SOME = [case for case in names(*PLAIN) if case[1] not in ("numpy_in_forward", "data_dependent_branch")][::8]


@pytest.mark.parametrize(("which", "name"), [case for case in _SOME if not case[1].startswith("packed")])
def test_it_is_what_torch_makes(which: str, name: str) -> None:
    sample = samples(which)[name]
    program = exported(sample.make(), sample.inputs())
    assert is_same(module.functional(program), program.run_decompositions({}))


def test_composite_operations_inside_conditions_stay() -> None:
    program = exported(Conditional(), (torch.randn(3, 4),))
    found = module.functional(program)
    assert is_same(found, program.run_decompositions({}))
    parts = [part for part in found.graph_module.children() if isinstance(part, fx.GraphModule)]
    inner = [str(node.target) for part in parts for node in part.graph.nodes]
    assert inner.count("aten.linear.default") == 2


def test_another_torch_is_asked_in_its_public_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(program: ExportedProgram) -> None:
        raise AttributeError("torch has no such function any more")

    monkeypatch.setattr(module, "_decomposing", changed)
    program = exported(nn.Sequential(nn.Linear(3, 2), nn.ReLU(inplace=True)), (torch.randn(3, 3),))
    assert is_same(module.functional(program), program.run_decompositions({}))
