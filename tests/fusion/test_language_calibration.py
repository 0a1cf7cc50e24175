"""Calibration data of language models: sequences or tokens are counted, and few of many places tell enough."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mergekit_ot import DataError, RecipeError, fuse, trace_model
from mergekit_ot.fusion.options import FusionOptions
from mergekit_ot.fusion.responses import ResponseGrams
from mergekit_ot.fusion.samples import tokens_per_sample, with_limit

_TOKENS, _WIDTH = 9, 12


class Language(nn.Module):
    """Predicts from each token and the mean of those before it, with one hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_TOKENS, 8)
        self.hidden, self.head = nn.Linear(8, _WIDTH), nn.Linear(_WIDTH, _TOKENS)

    def forward(self, tokens: Tensor) -> Tensor:
        values = self.embedding(tokens)
        steps = torch.arange(1, tokens.shape[1] + 1, device=tokens.device)[:, None]
        return self.head(torch.tanh(self.hidden(values + values.cumsum(1) / steps)))


def _net(seed: int) -> Language:
    torch.manual_seed(seed)
    return Language().eval()


def _tokens(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(_TOKENS, (count, length), generator=torch.Generator().manual_seed(seed))


def _reordered(net: Language, order: Tensor) -> Language:
    moved = Language().eval()
    moved.load_state_dict(net.state_dict())
    with torch.no_grad():
        moved.hidden.weight.copy_(net.hidden.weight[order])
        moved.hidden.bias.copy_(net.hidden.bias[order])
        moved.head.weight.copy_(net.head.weight[:, order])
    return moved


def _grams(nets: list[Language], batches: list[Tensor]) -> ResponseGrams:
    graphs = [trace_model(net, batches[0]) for net in nets]
    grams = ResponseGrams(graphs, [net.state_dict() for net in nets], sorted(graphs[0].free_groups), len(batches))
    for batch in batches:
        grams.add((batch,))
    return grams


def test_of_long_sequences_some_places_are_drawn_and_of_short_ones_all_are_taken() -> None:
    long, short = list(_tokens(200, 200).split(50)), list(_tokens(200, 5).split(50))
    for batches, all_of_them in ((long, 40_000), (short, 1000)):
        grams = _grams([_net(0), _net(1)], batches)
        columns = grams.columns["hidden.weight:0"]
        # At least one place of each sequence.
        assert 200 <= columns <= all_of_them
        assert (columns == all_of_them) == (batches is short)


def test_every_sample_counts_where_there_are_many() -> None:
    """Samples are asked for in so many words (calibration_size); only their places are drawn."""
    batches = list(_tokens(20_000, 2).split(1000))
    assert _grams([_net(0)], batches).columns["hidden.weight:0"] == 20_000


def test_the_drawn_places_are_the_same_in_every_source_and_every_run() -> None:
    """One source's neurons, in another order in the next one, respond alike: their distances are zero."""
    net, order = _net(2), torch.randperm(_WIDTH, generator=torch.Generator().manual_seed(3))
    batches = list(_tokens(100, 300).split(50))
    grams = _grams([net, _reordered(net, order)], batches)
    ours, theirs = grams.rows("hidden.weight:0") or []
    assert float((ours[order] - theirs).norm(dim=1).max()) < 1e-3 * float(ours.norm(dim=1).mean())
    again = _grams([net, _reordered(net, order)], batches)
    assert torch.equal(again.grams["hidden.weight:0"], grams.grams["hidden.weight:0"])


def test_what_is_drawn_tells_what_all_of_it_tells() -> None:
    batches = list(_tokens(100, 300).split(50))
    nets = [_net(4), _net(5)]
    drawn = _grams(nets, batches).rows("hidden.weight:0", standardised=True) or []
    everything = torch.corrcoef(torch.cat([_responses(net, torch.cat(batches)) for net in nets]))
    joined = torch.cat(drawn)
    assert float((joined @ joined.T - everything).abs().max()) < 0.06


def _responses(net: Language, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        values = net.embedding(tokens)
        steps = torch.arange(1, tokens.shape[1] + 1)[:, None]
        return torch.tanh(net.hidden(values + values.cumsum(1) / steps)).flatten(0, 1).T


def test_long_sequences_recover_a_planted_order() -> None:
    net = _net(6)
    moved = _reordered(net, torch.randperm(_WIDTH, generator=torch.Generator().manual_seed(7)))
    tokens = _tokens(60, 200)
    fused = fuse([net, moved], solver="activation-matching", data=[tokens], device="cpu").model()
    torch.testing.assert_close(fused(tokens), net(tokens))


@pytest.mark.parametrize(
    ("options", "sequences"),
    [
        ({}, 2000),
        ({"calibration_size": 5}, 5),
        ({"calibration_tokens": 640}, 40),
        ({"calibration_tokens": 655}, 40),
        ({"calibration_tokens": 10_000_000}, 625_000),
        ({"calibration_tokens": 640, "calibration_size": 5}, 5),
        ({"calibration_tokens": 64, "calibration_size": 500}, 4),
    ],
)
def test_tokens_are_counted_in_whole_sequences(options: dict[str, int], sequences: int) -> None:
    assert with_limit([_tokens(50, 16)], FusionOptions(**options))[1] == sequences


def test_data_that_can_be_read_once_lose_nothing_when_their_tokens_are_counted() -> None:
    def once() -> Iterator[Tensor]:
        yield from _tokens(30, 16).split(10)

    data, size = with_limit(once(), FusionOptions(calibration_tokens=320))
    assert size == 20
    assert torch.equal(torch.cat(list(data)), _tokens(30, 16))


def test_the_first_input_of_whole_numbers_is_counted() -> None:
    ids, mask = torch.zeros(2, 7).long(), torch.ones(2, 7).bool()
    assert tokens_per_sample([torch.zeros(2, 3, 30), mask, ids, torch.zeros(2, 9).long()]) == 7
    assert tokens_per_sample([torch.zeros(2, 7), torch.zeros(2).long()]) == 0


@pytest.mark.parametrize(
    ("data", "tokens", "said"),
    [
        ([torch.randn(20, 6)], 100, "hold no tokens.*calibration_size"),
        ([], 100, "hold no tokens"),
        ([_tokens(20, 16)], 15, "one sequence of the calibration data holds 16 tokens.*32 or more"),
    ],
)
def test_what_cannot_be_counted_in_tokens_is_told(data: list[Tensor], tokens: int, said: str) -> None:
    nets = [_net(8), _net(9)]
    with pytest.raises(DataError, match=said):
        fuse(nets, solver="activation-matching", data=data, calibration_tokens=tokens, device="cpu")


@pytest.mark.parametrize("tokens", [0, -3, 2.5, "many"])
def test_a_number_of_tokens_is_a_whole_one_of_at_least_one(tokens: object) -> None:
    with pytest.raises(RecipeError, match="calibration_tokens="):
        FusionOptions(calibration_tokens=tokens)  # type: ignore[arg-type]


def test_a_fusion_says_how_many_tokens_it_was_calibrated_on() -> None:
    nets = [_net(10), _net(11)]
    data = [_tokens(60, 16)]
    result = fuse(nets, solver="activation-matching", data=data, calibration_tokens=640, device="cpu")
    (note,) = result.notes
    assert note.startswith("Calibrated on 40 sequences of 16 tokens, 640 tokens in all")
    assert not fuse(nets, solver="wb", data=data, device="cpu").notes
