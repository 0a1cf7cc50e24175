"""Responses to calibration data: the streamed inner products are those of all responses at once."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from nets import Cnn, Mlp
from signed import traced_once
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_ot import DataError, FusionInputs, FusionOptions, default_manager, fuse, trace_model
from mergekit_ot.fusion.calibration import calibration_batches, inputs_of
from mergekit_ot.fusion.engine import FusionRun
from mergekit_ot.fusion.responses import ResponseGrams
from mergekit_ot.hooks.preparing import prepare

pytestmark = pytest.mark.usefixtures(traced_once.__name__)


def mlp(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Mlp((6, 8, 5, 3)).eval()


def cnn(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = Cnn().eval()
    with torch.no_grad():
        model.norm1.running_mean.normal_()
        model.norm2.running_var.uniform_(0.5, 2)
    return model


def grams_of(models: list[nn.Module], batches: list[Tensor]) -> ResponseGrams:
    graphs = [trace_model(model, batches[0]) for model in models]
    grams = ResponseGrams(graphs, [model.state_dict() for model in models], sorted(graphs[0].free_groups))
    for batch in batches:
        grams.add((batch,))
    return grams


def direct(responses: list[Tensor]) -> Tensor:
    """Inner products of the centred responses of all neurons of all sources, per response."""
    rows = torch.cat(responses).double()
    rows = rows - rows.mean(1, keepdim=True)
    return rows @ rows.T / rows.shape[1]


def inner(rows: list[Tensor]) -> Tensor:
    joined = torch.cat(rows).double()
    return joined @ joined.T


def mlp_responses(model: Mlp, inputs: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        first = torch.relu(model.layers[0](inputs))
        second = torch.relu(model.layers[1](first))
    return {"layers.0.weight:0": first.T, "layers.1.weight:0": second.T}


def cnn_responses(model: Cnn, inputs: Tensor) -> dict[str, Tensor]:
    """What the next layer reads: behind norm, activation and pooling, one response per sample and pixel."""
    with torch.no_grad():
        first = F.max_pool2d(F.relu(model.norm1(model.conv1(inputs))), 2)
        second = F.max_pool2d(F.relu(model.norm2(model.conv2(first))), 2)
        third = F.relu(model.fc1(second.flatten(1)))
    return {
        "conv1.weight:0": first.transpose(0, 1).flatten(1),
        "conv2.weight:0": second.transpose(0, 1).flatten(1),
        "fc1.weight:0": third.T,
    }


CASES = {"mlp": (mlp, mlp_responses, (6,)), "cnn": (cnn, cnn_responses, (1, 8, 8))}


@pytest.mark.parametrize("name", CASES)
def test_the_streamed_gram_equals_the_direct_one(name: str) -> None:
    make, responses_of, shape = CASES[name]
    models, inputs = [make(0), make(1)], torch.randn(60, *shape) + 0.5
    grams = grams_of(models, list(inputs.split(20)))
    expected = [responses_of(model, inputs) for model in models]
    for group in expected[0]:
        wanted = direct([each[group] for each in expected])
        found = grams.rows(group)
        assert found is not None
        assert [part.shape[0] for part in found] == [each[group].shape[0] for each in expected]
        torch.testing.assert_close(inner(found), wanted, rtol=1e-4, atol=1e-5 * float(wanted.diagonal().mean()))


@pytest.mark.parametrize("name", CASES)
def test_standardised_rows_have_the_correlations_as_inner_products(name: str) -> None:
    make, responses_of, shape = CASES[name]
    models, inputs = [make(2), make(3)], torch.randn(80, *shape)
    grams = grams_of(models, list(inputs.split(40)))
    for group, wanted in direct_correlations(models, responses_of, inputs).items():
        found = inner(grams.rows(group, standardised=True))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def direct_correlations(models, responses_of, inputs) -> dict[str, Tensor]:
    expected = [responses_of(model, inputs) for model in models]
    correlations = {}
    for group in expected[0]:
        rows = torch.cat([each[group] for each in expected]).double()
        alive = rows.var(1) > 0
        # A neuron that never answers has no correlation with any other.
        matrix = torch.zeros(rows.shape[0], rows.shape[0], dtype=torch.float64)
        matrix[alive.outer(alive)] = torch.corrcoef(rows[alive]).flatten()
        correlations[group] = matrix
    return correlations


@pytest.mark.parametrize("name", CASES)
def test_how_the_data_are_batched_does_not_change_it(name: str) -> None:
    make, _, shape = CASES[name]
    models, inputs = [make(4), make(5)], torch.randn(48, *shape)
    one, three, eight = (grams_of(models, list(inputs.split(size))) for size in (48, 16, 6))
    for group in one.groups:
        wanted = inner(one.rows(group))
        for other in (three, eight):
            assert other.columns[group] == one.columns[group]
            torch.testing.assert_close(inner(other.rows(group)), wanted, rtol=1e-4, atol=1e-6)


def test_a_shift_of_all_responses_is_not_seen() -> None:
    """The mean is left out: the next layer's bias takes it up."""
    still, shifted = mlp(6), mlp(6)
    for model in (still, shifted):
        # Large enough for every neuron to answer linearly.
        model.layers[0].bias.data.fill_(50.0)
    shifted.layers[0].bias.data.add_(30.0)
    ours, theirs = grams_of([still, shifted], list(torch.randn(40, 6).split(20))).rows("layers.0.weight:0") or []
    spread = torch.pdist(ours).mean()
    assert float((ours - theirs).norm(dim=1).max()) < 0.01 * float(spread)


def test_silent_neurons_stay_finite() -> None:
    model = mlp(7)
    model.layers[0].bias.data[:3] = -1e4
    for standardised in (False, True):
        for rows in grams_of([model], [torch.randn(20, 6)]).rows("layers.0.weight:0", standardised) or []:
            assert torch.isfinite(rows).all()
            assert float(rows[:3].norm(dim=1).max()) < 1e-3 * float(rows[3:].norm(dim=1).max())


def test_a_group_that_no_parameter_reads_has_no_responses() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x).square().sum(1)

    grams = grams_of([Product(), Product()], [torch.randn(8, 4)])
    assert grams.groups == ["encoder.weight:0"]
    assert grams.rows("encoder.weight:0") is None


def test_batches_are_cut_to_one_size_in_order_and_limited() -> None:
    data = list(torch.arange(23.0).split(5))
    batches = list(calibration_batches(data, 100, 4))
    assert [len(batch) for (batch,) in batches] == [4] * 5
    assert torch.equal(torch.cat([batch for (batch,) in batches]), torch.arange(20.0))
    assert sum(len(batch) for (batch,) in calibration_batches(data, 11, 4)) == 8


def test_no_more_data_are_read_than_asked_for() -> None:
    read = []

    def endless() -> Iterator[Tensor]:
        for number in itertools.count():
            read.append(number)
            yield torch.full((10, 2), float(number))

    assert len(list(calibration_batches(endless(), 40, 10))) == 4
    assert len(read) <= 5


def test_several_inputs_stay_together() -> None:
    data = [((torch.arange(4.0) + 4 * k, -torch.arange(4.0) - 4 * k), torch.zeros(4)) for k in range(3)]
    for one, other in calibration_batches(data, 12, 3):
        assert torch.equal(one, -other)


@pytest.mark.parametrize("samples", [0, 5])
def test_too_little_data_is_an_error_that_counts_them(samples: int) -> None:
    data = list(torch.randn(samples, 3).split(2)) if samples else []
    with pytest.raises(DataError, match=f"hold {samples} samples; at least 6 are needed"):
        list(calibration_batches(data, 100, 6))


@pytest.mark.parametrize("samples", [0, 1])
def test_a_fusion_with_too_little_data_says_so(samples: int) -> None:
    models, data = [mlp(8), mlp(9)], [torch.randn(samples, 6)]
    with pytest.raises(DataError, match=f"hold {samples} samples; at least 2"):
        fuse(models, solver="activation-matching", data=data)


@pytest.mark.parametrize("item", ["text", 3.5, {"x": 1}, ("text", "label"), ((), "label")])
def test_what_holds_no_tensor_is_refused(item: object) -> None:
    with pytest.raises(DataError, match="not a tensor or a pair"):
        inputs_of(item)


class Unreadable:
    """Targets that fail whoever looks at them."""

    def __getattribute__(self, name: str) -> object:
        raise AssertionError(f"the targets were read: {name}")

    def __len__(self) -> int:
        raise AssertionError("the targets were counted")

    def __iter__(self) -> Iterator[object]:
        raise AssertionError("the targets were iterated over")

    def __getitem__(self, place: object) -> object:
        raise AssertionError("the targets were indexed")


@pytest.mark.parametrize(("solver", "repair"), [("activation-matching", "none"), ("wb", "reset"), ("wb", "none")])
def test_targets_are_never_read(solver: str, repair: str) -> None:
    models = [cnn(10), cnn(11)]
    inputs = torch.randn(240, 1, 8, 8)
    for model in models:
        # Statistics of the data, so that the repair's control has nothing to object to.
        model.train()
        for norm in (model.norm1, model.norm2):
            norm.reset_running_stats()
            norm.momentum = None
        model(inputs)
        model.eval()
    result = fuse(models, solver=solver, repair=repair, data=[(batch, Unreadable()) for batch in inputs.split(80)])
    assert result.state.keys() == models[0].state_dict().keys()


def test_a_fusion_uses_all_its_calibration_data() -> None:
    inputs = FusionInputs([mlp(12), mlp(13)], data=list(torch.randn(250, 6).split(30)))
    options = FusionOptions(solver="activation-matching", device="cpu")
    setup = prepare(inputs, options, default_manager(), trace_model)
    run = FusionRun(setup)
    run.run()
    assert set(run.grams.columns.values()) == {200}


class StridesThatDiffer(nn.Module):
    """Flattens what a normalisation gives of a transposed tensor: captured with other strides than it runs with."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x).transpose(1, 2)).transpose(1, 2).flatten(1))


def test_responses_are_read_whatever_the_strides_are() -> None:
    inputs = torch.randn(3, 4, 5)
    models = [StridesThatDiffer().eval() for _ in range(2)]
    result = fuse(models, solver="activation-matching", data=[inputs], example_inputs=inputs, device="cpu")
    assert result.aligned_sources_max_error < 1e-5
    assert [group.solver for group in result.groups] == ["activation-matching"]
