"""A graph outlives its model: it holds no weights, and its program runs with any state dict."""

from __future__ import annotations

import gc
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._subclasses import FakeTensor
from torch.utils import _pytree as pytree

from mergekit_ot import AbstractFrontEnd, ArchitectureError, CapturedProgram, ExportFrontEnd, TraceBudget, trace_model
from mergekit_ot.graph.capture.capture import FrontEnds, capture

WIDTH = 48


class Net(nn.Module):
    """Weights, statistics, a table that no file brings, and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, WIDTH), nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, 2)
        self.register_buffer("table", torch.arange(2.0), persistent=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(inputs)))) + self.table * torch.tensor([1.0, 2.0])


def made(kind: type[nn.Module] = Net) -> nn.Module:
    torch.manual_seed(0)
    return kind() if kind is Net else nn.LSTM(4, WIDTH)


def run(program: CapturedProgram, state: dict[str, Tensor], inputs: Tensor) -> Tensor:
    return pytree.tree_leaves(fx.Interpreter(program.module).run(*program.arguments(state, [inputs])))[-1]


def reached(root: object) -> Iterator[Tensor]:
    """Yields the tensors with memory that an object holds, however deep; what the modules of Python hold is not its."""
    seen: dict[int, object] = {}
    left = [root]
    while left:
        value = left.pop()
        is_namespace = isinstance(value, dict) and "__builtins__" in value
        if id(value) in seen or is_namespace or isinstance(value, type | types.ModuleType | types.FrameType):
            continue
        seen[id(value)] = value
        if isinstance(value, Tensor) and not isinstance(value, FakeTensor) and not value.is_meta:
            yield value
        left += gc.get_referents(value)


@pytest.mark.parametrize("front_end", ["export", "make-fx"])
@pytest.mark.parametrize("kind", [Net, nn.LSTM])
def test_a_graph_holds_no_tensor_of_the_size_of_a_weight(front_end: str, kind: type[nn.Module]) -> None:
    model = made(kind)
    largest = max(weight.numel() for weight in model.parameters())
    assert any(tensor.numel() == largest for tensor in reached(model))
    graph = trace_model(model, torch.randn(2, 4), front_end=front_end)
    del model
    gc.collect()
    assert sum(tensor.untyped_storage().nbytes() for tensor in reached(graph)) < 4 * WIDTH
    assert graph.program is not None


@pytest.mark.parametrize("front_end", ["export", "make-fx", "symbolic"])
def test_its_program_computes_what_the_model_does_with_any_state(front_end: str) -> None:
    model, inputs = made().eval(), torch.randn(3, 4)
    program = trace_model(model, inputs, front_end=front_end).program
    for number in range(2):
        torch.manual_seed(number)
        state = {n: torch.rand_like(v) if v.is_floating_point() else v for n, v in model.state_dict().items()}
        model.load_state_dict(state)
        assert torch.allclose(run(program, state, inputs), model(inputs), atol=1e-6)


def test_counters_that_an_older_file_lacks_are_those_of_the_capture() -> None:
    model, inputs = made(), torch.randn(3, 4)
    program = trace_model(model, inputs).program
    state = {name: value for name, value in model.state_dict().items() if name != "norm.num_batches_tracked"}
    assert torch.allclose(run(program, state, inputs), model.eval()(inputs))


def test_a_state_without_a_weight_is_refused_by_name() -> None:
    model, inputs = made(), torch.randn(3, 4)
    program = trace_model(model, inputs).program
    state = {name: value for name, value in model.state_dict().items() if name != "last.weight"}
    with pytest.raises(ArchitectureError, match=r"reads 'last\.weight', which the state"):
        program.arguments(state, [inputs])


def test_a_state_of_half_precision_is_read_in_the_types_of_the_capture() -> None:
    model, inputs = made(), torch.randn(3, 4)
    program = trace_model(model, inputs).program
    state = {name: value.bfloat16() if value.ndim else value for name, value in model.state_dict().items()}
    rounded = {name: value.float() if value.ndim else value for name, value in state.items()}
    assert torch.equal(run(program, state, inputs), run(program, rounded, inputs))


class Looking(AbstractFrontEnd):
    """Notes the module that it is given."""

    def __init__(self, seen: list[nn.Module]) -> None:
        self.seen = seen

    def capture(self, model: nn.Module, inputs: tuple[object, ...], budget: TraceBudget) -> CapturedProgram:
        self.seen.append(model)
        return ExportFrontEnd().capture(model, inputs, budget)


class LookingOnly(Looking):
    """Promises to write into no parameter."""

    shares_weights = True


@pytest.mark.parametrize("kind", [Looking, LookingOnly])
def test_weights_are_copied_for_a_front_end_that_may_write_into_them_only(kind: Any) -> None:
    model, seen = made(), list[nn.Module]()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    capture(model, torch.randn(2, 4), FrontEnds({"looking": lambda: kind(seen)}, "looking"))
    own, given = dict(model.named_parameters()), dict(seen[0].named_parameters())
    for name in own:
        assert given[name] is not own[name]
        assert (given[name].data_ptr() == own[name].data_ptr()) is kind.shares_weights
    for name, buffer in model.named_buffers():
        assert dict(seen[0].named_buffers())[name].data_ptr() != buffer.data_ptr()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_export_needs_no_copy_of_the_weights() -> None:
    assert ExportFrontEnd.shares_weights
