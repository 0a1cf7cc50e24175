"""Laws of the refit of recurrent layers."""

from __future__ import annotations

import pytest
import torch
from mergeot_repair.refit.recurrent import Cell, cells_of
from signed import traced_once
from torch import Tensor, nn

from mergekit_ot import fuse

pytestmark = pytest.mark.usefixtures(traced_once.__name__)

KINDS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}


class Recurrent(nn.Module):
    """A recurrent layer and a linear one on its last state."""

    def __init__(self, kind: str, hidden: int, seed: int, **options: object) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.recurrent = KINDS[kind](5, hidden, batch_first=True, **options)
        self.classifier = nn.Linear(hidden * (2 if options.get("bidirectional") else 1), 3)

    def forward(self, steps: Tensor) -> Tensor:
        """Returns the scores."""
        return self.classifier(self.recurrent(steps)[0][:, -1])


def _data(count: int = 300) -> Tensor:
    return torch.randn(count, 7, 5, generator=torch.Generator().manual_seed(5))


OPTIONS = [{}, {"num_layers": 2}, {"bidirectional": True}, {"bias": False}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_fused_with_itself_stays(kind: str, options: dict[str, object]) -> None:
    net, data = Recurrent(kind, 6, 0, **options).eval(), _data()
    fused = fuse([net, net], solver="gwb", data=[data], calibration_size=300, repair="refit", device="cpu").model()
    with torch.no_grad():
        assert torch.allclose(fused(data), net(data), atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_fused_with_its_reordered_copy_stays(kind: str) -> None:
    net, data = Recurrent(kind, 6, 0).eval(), _data()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(2))
    other = Recurrent(kind, 6, 0).eval()
    gates = {"rnn": 1, "lstm": 4, "gru": 3}[kind]
    rows = torch.cat([order + 6 * gate for gate in range(gates)])
    with torch.no_grad():
        for name, value in other.recurrent.named_parameters():
            value.copy_(value[rows][:, order] if "weight_hh" in name else value[rows])
        other.classifier.weight.copy_(other.classifier.weight[:, order])
        assert torch.allclose(other(data), net(data), atol=1e-5)
    fused = fuse([net, other], solver="gwb", data=[data], calibration_size=300, repair="refit", device="cpu").model()
    with torch.no_grad():
        assert torch.allclose(fused(data), net(data), atol=1e-3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_it_comes_nearer_to_the_mean_of_the_sources(kind: str, options: dict[str, object]) -> None:
    nets = [Recurrent(kind, 8, seed, **options).eval() for seed in (1, 2)]
    data, held_out = _data(600), torch.randn(200, 7, 5, generator=torch.Generator().manual_seed(8))
    with torch.no_grad():
        goal = (nets[0](held_out) + nets[1](held_out)) / 2
        errors = [
            float(
                (
                    fuse(nets, solver="gwb", data=[data], calibration_size=600, repair=repair, device="cpu").model()(
                        held_out
                    )
                    - goal
                )
                .square()
                .mean()
            )
            for repair in ("none", "refit")
        ]
    assert errors[1] < 0.7 * errors[0]


def test_widths_may_differ() -> None:
    nets = [Recurrent("lstm", hidden, seed).eval() for seed, hidden in ((1, 8), (2, 12))]
    data = _data(600)
    with torch.no_grad():
        goal = (nets[0](data) + nets[1](data)) / 2
        errors = [
            float(
                (
                    fuse(nets, solver="gwb", data=[data], calibration_size=600, repair=repair, device="cpu").model()(
                        data
                    )
                    - goal
                )
                .square()
                .mean()
            )
            for repair in ("none", "refit")
        ]
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize("is_reverse", [False, True])
@pytest.mark.parametrize("kind", ["lstm", "gru", "rnn_tanh"])
def test_parts_of_a_cell_make_its_states(kind: str, is_reverse: bool) -> None:
    torch.manual_seed(0)
    layer = KINDS[kind.removesuffix("_tanh")](5, 4, batch_first=True)
    cell = Cell(kind, ("w", "u", "b", "c"), is_reverse)
    tensors = [value.detach() for value in layer.parameters()]
    inputs, start = torch.randn(3, 6, 5), [torch.randn(3, 4), torch.randn(3, 4)]
    states = cell.states(tensors, inputs, start if kind == "lstm" else start[:1])
    before = cell.before(states, start)
    made, read = cell.parts(tensors, inputs, before)
    if kind == "rnn_tanh":
        assert torch.allclose(torch.tanh(made + read), states, atol=1e-6)
    elif kind == "gru":
        (mr, mz, mn), (rr, rz, rn) = made.chunk(3, 2), read.chunk(3, 2)
        new, update = torch.tanh(mn + torch.sigmoid(mr + rr) * rn), torch.sigmoid(mz + rz)
        assert torch.allclose((1 - update) * new + update * before, states, atol=1e-6)
    else:
        memory = start[1]
        for step in reversed(range(6)) if is_reverse else range(6):
            keep, forget, new, show = (made + read)[:, step].chunk(4, 1)
            memory = torch.sigmoid(forget) * memory + torch.sigmoid(keep) * torch.tanh(new)
            assert torch.allclose(torch.sigmoid(show) * torch.tanh(memory), states[:, step], atol=1e-6)


def test_projections_are_left_alone() -> None:
    assert cells_of("lstm", ["w", "u", "b", "c", "p"], 1, is_bidirectional=False) == []


class Encoded(nn.Module):
    """A linear layer, two recurrent layers in both directions, and a linear one."""

    def __init__(self, kind: str, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.encoder = nn.Linear(5, 7)
        self.recurrent = KINDS[kind](7, 6, 2, batch_first=True, bidirectional=True)
        self.classifier = nn.Linear(12, 3)

    def forward(self, steps: Tensor) -> Tensor:
        """Returns the scores."""
        return self.classifier(self.recurrent(torch.relu(self.encoder(steps)))[0].mean(1))


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind != "lstm" else []) for kind in KINDS]
)
def test_neurons_before_and_inside_recurrent_layers_are_chosen_together(kind: str) -> None:
    nets = [Encoded(kind, seed).eval() for seed in (1, 2)]
    data, held_out = _data(600), torch.randn(200, 7, 5, generator=torch.Generator().manual_seed(8))
    plain, refitted = (
        fuse(nets, solver="gwb", data=[data], calibration_size=600, repair=repair, device="cpu")
        for repair in ("none", "refit")
    )
    # The encoder's neurons, and those of two directions of two layers.
    assert refitted.notes[0].startswith("Refit took over 31 neurons of 5 groups")
    with torch.no_grad():
        goal = (nets[0](held_out) + nets[1](held_out)) / 2
        errors = [float((one.model()(held_out) - goal).square().mean()) for one in (plain, refitted)]
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_fused_with_halves_of_itself_is_found_again(kind: str) -> None:
    """Two halves that do not read each other, fused with the first half twice: the right choice loses nothing."""
    whole = Recurrent(kind, 6, 0).eval()
    gates = {"rnn": 1, "lstm": 4, "gru": 3}[kind]
    other = Recurrent(kind, 6, 0).eval()
    rows = torch.cat([torch.arange(3) + 6 * gate for gate in range(gates)])
    with torch.no_grad():
        hidden = whole.recurrent.weight_hh_l0
        for gate in range(gates):
            hidden[6 * gate : 6 * gate + 3, 3:] = 0
            hidden[6 * gate + 3 : 6 * gate + 6, :3] = 0
        other.load_state_dict(whole.state_dict())
        for value in other.recurrent.parameters():
            doubled = torch.cat([torch.cat([value[rows[3 * g : 3 * g + 3]]] * 2) for g in range(gates)])
            value.copy_(doubled)
        other.recurrent.weight_hh_l0.copy_(hidden)
        for gate in range(gates):
            block = hidden[6 * gate : 6 * gate + 3, :3]
            other.recurrent.weight_hh_l0[6 * gate + 3 : 6 * gate + 6, 3:] = block
    data = _data(400)
    fused = fuse([whole, other], solver="gwb", data=[data], calibration_size=400, repair="refit", device="cpu").model()
    with torch.no_grad():
        goal = (whole(data) + other(data)) / 2
        assert float((fused(data) - goal).abs().max()) < 1e-2 * float(goal.abs().max())


class Headed(nn.Module):
    """A recurrent layer that cannot be fitted, and a head of two linear layers that can."""

    def __init__(self, seed: int, is_packed: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.is_packed = is_packed
        self.recurrent = nn.LSTM(5, 6, batch_first=True, proj_size=0 if is_packed else 4)
        self.head = nn.Sequential(nn.Linear(6 if is_packed else 4, 9), nn.ReLU(), nn.Linear(9, 3))

    def forward(self, steps: Tensor) -> Tensor:
        """Returns the scores."""
        if not self.is_packed:
            return self.head(self.recurrent(steps)[0][:, -1])
        lengths = torch.full((len(steps),), steps.shape[1])
        packed = nn.utils.rnn.pack_padded_sequence(steps, lengths, batch_first=True)
        return self.head(self.recurrent(packed)[1][0][0])


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_head_is_fitted_behind_a_layer_that_is_left_alone(is_packed: bool) -> None:
    nets, data = [Headed(seed, is_packed).eval() for seed in (1, 2)], _data(400)
    plain, refitted = (
        fuse(nets, solver="gwb", data=[data], calibration_size=400, repair=repair, device="cpu")
        for repair in ("none", "refit")
    )
    left = [name for name in plain.state if name.startswith("recurrent")]
    assert all(torch.equal(plain.state[name], refitted.state[name]) for name in left)
    with torch.no_grad():
        goal = (nets[0](data) + nets[1](data)) / 2
        errors = [float((one.model()(data) - goal).square().mean()) for one in (plain, refitted)]
    assert errors[1] < 0.7 * errors[0]
