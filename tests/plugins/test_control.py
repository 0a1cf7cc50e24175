"""What the controls of a repair count as a prediction."""

from __future__ import annotations

import pytest
import torch
from mergeot_repair.control import changed_predictions
from torch import Tensor, nn

from mergekit_ot import axis_of_classes


class _Scores(nn.Module):
    """Gives the same scores for any input."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = nn.Parameter(scores)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.scores


def _changed(scores: Tensor, others: Tensor, inputs: Tensor) -> tuple[int, int]:
    return changed_predictions(_Scores(scores), _Scores(others), [(inputs,)])


def test_every_token_has_a_prediction() -> None:
    scores = torch.arange(7.0).repeat(2, 5, 1)
    others = scores.clone()
    others[1, 3] = scores[1, 3].flip(0)
    assert _changed(scores, others, torch.zeros(2, 5).long()) == (1, 10)


def test_which_time_has_the_largest_score_is_no_prediction_of_a_token_model() -> None:
    scores = torch.arange(7.0).repeat(2, 5, 1)
    later = scores + torch.arange(5.0)[:, None]
    assert _changed(scores, later, torch.zeros(2, 5).long()) == (0, 10)


def test_every_pixel_has_a_prediction_along_the_channels() -> None:
    scores = torch.arange(3.0)[:, None, None].repeat(2, 1, 4, 4)
    others = scores.clone()
    others[0, :, 1, 2] = scores[0, :, 1, 2].flip(0)
    assert _changed(scores, others, torch.zeros(2, 3, 4, 4)) == (1, 32)


@pytest.mark.parametrize(
    ("shape", "inputs", "axis"),
    [
        ((8, 10), [torch.zeros(8, 3, 4, 4)], 1),
        ((8, 10), [torch.zeros(8, 6).long()], 1),
        ((8, 6, 10), [torch.zeros(8, 6).long()], -1),
        ((8, 6, 10), [torch.zeros(8, 9).long(), torch.zeros(8, 6).long()], -1),
        ((8, 6, 10), [torch.zeros(8, 6, 2)], -1),
        ((8, 10, 6), [torch.zeros(8, 6).long()], 1),
        ((8, 10, 6), [torch.zeros(8, 3, 6)], 1),
        ((8, 10, 6), [torch.zeros(8, 10, 6)], 1),
        ((8, 10, 4, 4), [torch.zeros(8, 3, 4, 4)], 1),
        ((8, 10, 4, 4), [torch.zeros(8, 10, 4, 4)], 1),
    ],
)
def test_classes_are_looked_for_where_evaluation_finds_them(shape: tuple, inputs: list, axis: int) -> None:
    assert axis_of_classes(shape, inputs) == axis
