"""Normal forms: what no exact rewrite exists for is refused, with a reason that says why."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from normal_nets import (
    ROWS,
    TOKENS,
    WIDTH,
    Attention,
    Block,
    Language,
    Mlp,
    Multiple,
    change,
    found,
    gpt,
    random_state,
)
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_ot.graph.normal_form.form import NormalForm
from mergekit_ot.graph.normal_form.rewrites import Fold, MoveBias


class PostNorm(nn.Module):
    """The norm stands behind the sum, so that its value is the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mlp, self.head = nn.Linear(WIDTH, WIDTH), Mlp(), nn.Linear(WIDTH, 3)
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.n1(self.embed(x))
        return self.head(self.n2(x + self.mlp(x)))


class Read(nn.Module):
    """A norm whose value is read by one function more than the head."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.embed, self.norm, self.head = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.embed(x))
        return self.head(y) + self.function(y)


class Scaled(nn.Module):
    """LayerScale, or one learned number, on the branch."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.embed, self.norm, self.mlp = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), Mlp()
        self.scale = nn.Parameter(torch.randn(shape))
        self.last, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.scale * self.mlp(self.norm(x))
        return self.head(self.last(x))


class Concatenated(nn.Module):
    """A norm over two streams side by side."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, 5), nn.Linear(WIDTH, 6)
        self.norm, self.head = nn.LayerNorm(11), nn.Linear(11, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.cat([self.one(x), self.other(x)], -1)))


class NormedKeys(nn.Module):
    """Queries and keys behind norms of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.q_norm, self.k_norm = nn.RMSNorm(4), nn.RMSNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.embed(x))
        q, k, v = (m(y).view(2, -1, 2, 4).transpose(1, 2) for m in (self.q, self.k, self.v))
        z = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.head(self.o(z.transpose(1, 2).flatten(2)))


class BiasedRms(nn.Module):
    """A norm without centring that has a bias, read by a map that has none."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3, bias=False)
        self.gain, self.shift = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.rms_norm(self.embed(x), (WIDTH,)) * self.gain + self.shift)


class Padded(nn.Module):
    """A convolution that reads zeros around a norm: they are not shifted by its bias."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.conv = (
            nn.Linear(WIDTH, WIDTH),
            nn.LayerNorm(WIDTH),
            nn.Conv1d(WIDTH, 3, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(self.embed(x)).transpose(1, 2))


class SharedReader(nn.Module):
    """One map reads two norms with different gains."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.n1, self.n2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.n1(x)) + self.head(self.n2(x)).relu()


class ReadStream(nn.Module):
    """A stream that a map reads as it is, beside the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.head, self.other = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.norm(x)) + self.other(x)


class Outside(nn.Module):
    """The norm is what the model returns."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.embed(x))


class Capped(nn.Module):
    """Scores that are squashed before softmax see a bias of the keys; values keep one that O has no place for."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.o = nn.Linear(WIDTH, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.tanh(self.q(x) @ self.k(x).transpose(-2, -1))
        return self.o(scores.softmax(-1) @ self.v(x))


class Sink(nn.Module):
    """Weights of attention that do not sum to one: one more key whose value is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(-2, -1)
        return self.o(F.pad(scores, (1, 0)).softmax(-1)[..., 1:] @ self.v(x))


def rotary() -> nn.Module:
    """Returns a model whose biased keys are turned by their places."""
    return Language(nn.LayerNorm, Block(nn.LayerNorm, Attention(rotary=True), Mlp()), places=False)


# Network → inputs, and what is refused: parameter → a word of the reason.
REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[object, ...], dict[str, str]]] = {
    "post-norm": (PostNorm, ROWS, {"n1.weight": "a sum", "n1.bias": "a sum", "mlp.down.weight": "n1"}),
    "read by a nonlinear operation": (lambda: Read(torch.tanh), ROWS, {"norm.weight": "aten.tanh"}),
    "read by a product": (lambda: Read(lambda y: y * y), ROWS, {"norm.weight": "aten.mul"}),
    "half of a norm with a bias": (lambda: Multiple(bias=True), ROWS, {"norm.weight": "aten.mul"}),
    "concatenation": (Concatenated, ROWS, {"norm.weight": "concatenation", "norm.bias": "concatenation"}),
    "query-key norms": (NormedKeys, ROWS, {"q_norm.weight": "attention", "k_norm.weight": "attention"}),
    "layer scale": (lambda: Scaled(WIDTH), ROWS, {"embed.weight": "aten.mul"}),
    "tied": (gpt, TOKENS, {"norm.weight": "Untied", "norm.bias": "Untied", "words.weight": "Untied"}),
    "bias without a place": (BiasedRms, ROWS, {"gain": "'head.weight'", "shift": "no bias"}),
    "zeros around": (Padded, ROWS, {"norm.weight": "zeros", "norm.bias": "zeros"}),
    "one map of two norms": (SharedReader, ROWS, {"n1.weight": "'head.weight'", "n2.weight": "'head.weight'"}),
    "a stream that is read as it is": (ReadStream, ROWS, {"embed.weight": "not through a LayerNorm"}),
    "an output": (Outside, ROWS, {"norm.weight": "output"}),
    "rotary": (rotary, TOKENS, {"blocks.0.attention.k.bias": "rotary"}),
    "capped scores": (Capped, ROWS, {"v.bias": "'o.weight'"}),
}


def _named(form: NormalForm) -> set[str]:
    """Returns the gains, biases and moved biases that a form does away with."""
    folds = [rewrite for rewrite in form.rewrites if isinstance(rewrite, Fold)]
    moves = [rewrite.bias for rewrite in form.rewrites if isinstance(rewrite, MoveBias)]
    return {name for fold in folds for name in (fold.gain, fold.bias) if name is not None} | set(moves)


@pytest.mark.parametrize("case", REFUSED)
def test_it_is_refused_with_a_reason(case):
    make, inputs, refused = REFUSED[case]
    form = found(make, inputs)
    for parameter, word in refused.items():
        reasons = [refusal.reason for refusal in form.refusals if refusal.parameter == parameter]
        assert any(word in reason for reason in reasons), (parameter, reasons)
        assert all(reason[0].isupper() or reason[0] == "'" for reason in reasons)
        assert all(reason.endswith(".") for reason in reasons)
    assert not _named(form) & set(refused)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_left_keeps_the_function(case):
    make, inputs, _ = REFUSED[case]
    form, state = found(make, inputs), random_state(make)
    assert change(make, state, form.of_state(state), inputs) <= 1e-10


@pytest.mark.parametrize("case", ["read by a nonlinear operation", "query-key norms", "bias without a place"])
def test_doing_it_all_the_same_changes_the_function(case):
    # What is refused is refused rightly: the gain, taken away and given to what reads the norm linearly, is missed.
    make, inputs, refused = REFUSED[case]
    state = random_state(make)
    gain = next(iter(refused))
    assert change(make, state, {**state, gain: torch.ones_like(state[gain])}, inputs) > 1e-6


def _kinds(form: NormalForm, *names: str) -> list[str]:
    return [type(rewrite).__name__ for rewrite in form.rewrites if set(names) & rewrite.names]


def test_layer_scale_allows_folds_but_no_centred_stream():
    form = found(lambda: Scaled(WIDTH), ROWS)
    assert {"norm.weight", "last.weight"} <= _named(form)
    assert not form.centred


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_learned_number_on_a_branch_does_not_disturb(shape: Sequence[int]):
    form, state = found(lambda: Scaled(*shape), ROWS), random_state(lambda: Scaled(*shape))
    assert form.centred == {"embed.weight:0"}
    assert change(lambda: Scaled(*shape), state, form.of_state(state), ROWS) <= 1e-10


def test_a_bias_of_keys_that_are_capped_stays():
    assert "k.bias" not in _named(found(Capped, ROWS))


def test_weights_of_attention_that_do_not_sum_to_one_keep_the_bias_of_values():
    form = found(Sink, ROWS)
    assert "v.bias" not in _named(form)


def test_an_untied_head_takes_all():
    form = found(lambda: gpt(tied=False), TOKENS)
    assert form.refusals == ()
    assert "Centre" in _kinds(form, "words.weight")
    assert {"norm.weight", "norm.bias"} <= _named(form)


def test_a_norm_behind_the_sum_leaves_no_centred_stream():
    assert not found(PostNorm, ROWS).centred
