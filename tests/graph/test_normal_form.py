"""Normal forms: they keep the function, twice is once, and what they promise of a state holds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import Cnn
from normal_nets import (
    IMAGES,
    ROWS,
    TOKENS,
    WIDTH,
    Attention,
    Block,
    Language,
    Mlp,
    SwiGlu,
    Vit,
    change,
    found,
    gpt,
    llama,
    random_state,
)
from torch import Tensor, nn

from mergekit_ot import trace_model
from mergekit_ot.graph.normal_form import find
from mergekit_ot.graph.normal_form.find import find_normal_form
from mergekit_ot.graph.normal_form.form import NormalForm
from mergekit_ot.graph.normal_form.rewrites import Centre, Fold, MoveBias

TOLERANCE = 1e-10


def encoder() -> nn.Module:
    """Torch's encoder with the norms in front."""
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True, norm_first=True)
    stack = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), stack, nn.Linear(WIDTH, 3))


class Multihead(nn.Module):
    """Torch's attention between two inputs, each behind its own norm: the fused weight is read in two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.n1, self.n2, self.n3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, y = self.one(x), self.other(x.flip(1))
        memory = self.n2(y)
        x = x + self.attention(self.n1(x), memory, memory)[0]
        return self.head(self.n3(x).mean(1))


class Fused(nn.Module):
    """A fused projection, cut into queries, keys and values of fewer heads, in Llama's hand-spelled norm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, WIDTH + 8), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).split([d, 4, 4], -1)
        q, k, v = (y.view(b, t, -1, 4).transpose(1, 2) for y in (q, k, v))
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.o(y.transpose(1, 2).reshape(b, t, d))


class SpelledRms(nn.Module):
    """RMSNorm as transformers spells it, with a cast; Gemma's gain is one more than its weight."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.randn(width)), offset

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.float64)
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        gain = self.offset + self.weight if self.offset else self.weight
        return gain * y.to(x.dtype)


class SpelledLayerNorm(nn.Module):
    """LayerNorm by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.shift = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        y = x - x.mean(-1, keepdim=True)
        return y / torch.sqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5) * self.gain + self.shift


class Convolved(nn.Module):
    """A norm that a convolution without padding reads, and a head that reads a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.conv, self.head = nn.Conv1d(WIDTH, 5, 3), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.embed(x))
        return self.conv(y.transpose(1, 2)).mean(-1) + self.head(y.mean(1))


class Grouped(nn.Module):
    """Torch's attention of two heads of queries on one of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(y.transpose(1, 2).flatten(2))


class Masked(nn.Module):
    """Torch's multi-head attention with a mask that is added, and its weights asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype).triu(1)
        return self.attention(x, x, x, attn_mask=mask, need_weights=True)[0]


class UnitNorm(nn.Module):
    """RMSNorm as a vector of length one, times a number and a gain."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.length = nn.Parameter(torch.randn(width)), width**0.5

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.normalize(x, dim=-1) * self.length * self.gain


class Products(nn.Module):
    """Maps written as products and sums, with weights that stand the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.shift = nn.Parameter(torch.randn(WIDTH, 12)), nn.Parameter(torch.randn(12))
        self.down, self.last = nn.Parameter(torch.randn(WIDTH, 12)), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.up + self.shift) @ self.down.T + self.last


class SharedNorm(nn.Module):
    """One norm, read by other maps at each of its two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.mlp, self.head = Mlp(), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(self.norm(x + self.mlp(self.norm(x))))


def twice() -> nn.Module:
    """Returns a model that runs one block twice: every tensor of it has two names."""
    block = Block(nn.LayerNorm, Attention(), Mlp())
    return Language(nn.LayerNorm, block, block, head_bias=True)


def spelled(
    norm: Callable[[int], nn.Module], attention: type[nn.Module] = Fused, mlp: type[nn.Module] = Mlp
) -> Callable[[], nn.Module]:
    """Returns what makes a language model with one kind of norm, attention and network."""
    return lambda: Language(norm, Block(norm, attention(), mlp()), head_bias=True)


# Network → how many of each rewrite, and whether the stream is centred: counted by hand.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[object, ...], tuple[int, int, int], bool]] = {
    "gpt, tied": (gpt, TOKENS, (4, 4, 1), False),
    "gpt, untied": (lambda: gpt(tied=False), TOKENS, (5, 4, 1), True),
    "gpt, head with a bias": (lambda: gpt(tied=False, head_bias=True), TOKENS, (5, 4, 1), True),
    "llama": (llama, TOKENS, (5, 0, 0), False),
    "vit": (Vit, IMAGES, (3, 2, 1), True),
    "torch's encoder": (encoder, ROWS, (5, 2, 1), True),
    "torch's attention of two inputs": (Multihead, ROWS, (3, 1, 2), True),
    "hand-spelled RMSNorm, fused": (spelled(SpelledRms), TOKENS, (3, 1, 0), False),
    "one plus the gain": (spelled(lambda width: SpelledRms(width, 1.0)), TOKENS, (3, 1, 0), False),
    "hand-spelled LayerNorm": (spelled(SpelledLayerNorm), TOKENS, (3, 1, 1), True),
    "LayerNorm without bias": (spelled(lambda width: nn.LayerNorm(width, bias=False)), TOKENS, (3, 1, 1), True),
    "convolution behind a norm": (Convolved, ROWS, (1, 0, 1), True),
    "one block twice": (twice, TOKENS, (3, 0, 1), True),
    "one norm in two places": (SharedNorm, ROWS, (1, 0, 1), True),
    "grouped queries": (spelled(nn.LayerNorm, Grouped), TOKENS, (3, 2, 1), True),
    "mask that is added": (spelled(nn.LayerNorm, Masked), TOKENS, (3, 1, 1), True),
    "norm of length one": (spelled(UnitNorm), TOKENS, (3, 1, 0), False),
    "products and sums": (spelled(nn.LayerNorm, Fused, Products), TOKENS, (3, 1, 1), True),
    "alibi": (
        lambda: Language(nn.LayerNorm, Block(nn.LayerNorm, Attention(alibi=True), SwiGlu()), places=False),
        TOKENS,
        (3, 2, 1),
        True,
    ),
    "spelled attention": (
        lambda: Language(nn.LayerNorm, Block(nn.LayerNorm, Attention(spelled=True), Mlp())),
        TOKENS,
        (3, 2, 1),
        True,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_function_is_kept_and_twice_is_once(case):
    make, inputs, _, _ = CASES[case]
    form = found(make, inputs)
    for seed in (5, 6):
        state = random_state(make, seed)
        new = form.of_state(state)
        assert change(make, state, new, inputs) <= TOLERANCE
        again = form.of_state(new)
        assert all(torch.allclose(again[name], new[name], rtol=0, atol=1e-12) for name in new)


@pytest.mark.parametrize("case", CASES)
def test_rewrites_are_those_counted_by_hand(case):
    make, inputs, (folds, moves, centres), is_centred = CASES[case]
    form = found(make, inputs)
    kinds = [type(rewrite) for rewrite in form.rewrites]
    assert (kinds.count(Fold), kinds.count(MoveBias), kinds.count(Centre)) == (folds, moves, centres)
    assert bool(form.centred) == is_centred


@pytest.mark.parametrize("case", CASES)
def test_the_state_fits_and_what_is_not_named_stays(case):
    make, inputs, _, _ = CASES[case]
    form = found(make, inputs)
    state = make().state_dict()
    new = form.of_state(state)
    assert list(new) == list(state)
    written = frozenset[str]().union(*(rewrite.names for rewrite in form.rewrites))
    assert written <= set(state)
    for name, value in state.items():
        assert (new[name].shape, new[name].dtype) == (value.shape, value.dtype)
        assert name in written or new[name] is value
    aliases = trace_model(make(), inputs).aliases
    assert all(torch.equal(new[further], new[name]) for further, name in aliases.items())


@pytest.mark.parametrize("case", CASES)
def test_neutral_names_do_nothing_and_centred_streams_have_mean_zero(case):
    make, inputs, _, _ = CASES[case]
    form, graph = found(make, inputs), trace_model(make(), inputs)
    new = form.of_state(random_state(make))
    named = [name for names in form.neutral.values() for name in names]
    assert len(named) == len(set(named)) > 0
    offsets = {rewrite.gain: 1 - rewrite.offset for rewrite in form.rewrites if isinstance(rewrite, Fold)}
    for name in named:
        # The bias of a norm that a map without bias reads is all ones.
        allowed = [offsets[name]] if name in offsets else [0.0, 1.0]
        assert any(bool((new[name] == value).all()) for value in allowed), name
    for key in form.centred:
        for slot in graph.groups[key].members:
            if slot.parameter not in named and slot.parameter not in _with_constant(form):
                assert float(new[slot.parameter].mean(slot.axis).abs().max()) < 1e-12


def _with_constant(form: NormalForm) -> set[str]:
    """Returns the weights that hold, along the all-ones vector, what the bias of a norm gave a map without bias."""
    constant = [rewrite for rewrite in form.rewrites if isinstance(rewrite, Fold) and rewrite.is_constant]
    return {reader.weight.name for rewrite in constant for reader in rewrite.readers if reader.bias is None}


@pytest.mark.parametrize("case", ["gpt, tied", "vit", "one plus the gain"])
def test_tensors_are_read_one_at_a_time(case):
    make, inputs, _, _ = CASES[case]
    form, state = found(make, inputs), random_state(make)
    whole = form.of_state(state)
    for name in state:
        asked: list[str] = []

        def read(other: str, asked: list[str] = asked) -> Tensor:
            asked.append(other)
            return state[other]

        assert torch.equal(form.tensor(name, read), whole[name])
        assert len(set(asked)) <= 8 < len(state)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    form, state = found(Vit, IMAGES), random_state(Vit)
    half = {name: value.to(dtype) for name, value in state.items()}
    precise = form.of_state({name: value.double() for name, value in half.items()})
    assert all(torch.equal(value, precise[name].to(dtype)) for name, value in form.of_state(half).items())


def test_a_part_of_a_rewrite_changes_the_function():
    # Otherwise the law above could not fail.
    form, state = found(Vit, IMAGES), random_state(Vit)
    new = form.of_state(state)
    for rewrite in form.rewrites:
        if isinstance(rewrite, Fold):
            gain_only = {**state, rewrite.gain: new[rewrite.gain]}
            assert change(Vit, state, gain_only, IMAGES) > 1e-6
        if isinstance(rewrite, MoveBias) and rewrite.readers:
            bias_only = {**state, rewrite.bias: torch.zeros_like(state[rewrite.bias])}
            assert change(Vit, state, bias_only, IMAGES) > 1e-6


def test_what_the_data_flow_wrongly_suggests_is_refused_by_the_proof(monkeypatch):
    lies = [MoveBias((), "block.attention.q.bias", (0, 3)), Fold((), "block.n1.weight", None, ())]
    guess = find.guess_moves

    def lying(view):
        moves, refusals = guess(view)
        return [lies[0], *moves, lies[1]], refusals

    honest = found(Vit, IMAGES)
    monkeypatch.setattr(find, "guess_moves", lying)
    form = found(Vit, IMAGES)
    assert not set(lies[:1]) & set(form.rewrites)
    assert "block.attention.q.bias" in {refusal.parameter for refusal in form.refusals}
    assert set(honest.rewrites) <= set(form.rewrites)
    assert form.centred == honest.centred


def test_a_fold_that_fails_leaves_its_readers_uncentred(monkeypatch):
    # What reads a norm may be centred only once its gain is folded.
    guess = find.guess_folds

    def lying(view, norms):
        guesses, refusals = guess(view, norms)
        broken = guesses[0].fold.__class__((), guesses[0].fold.gain, guesses[0].fold.bias, ())
        return [guesses[0].__class__(broken, guesses[0].norms, guesses[0].maps), *guesses[1:]], refusals

    monkeypatch.setattr(find, "guess_folds", lying)
    form, state = found(Vit, IMAGES), random_state(Vit)
    assert "block.n1.weight" in {refusal.parameter for refusal in form.refusals}
    assert any(isinstance(rewrite, Centre) for rewrite in form.rewrites)
    assert change(Vit, state, form.of_state(state), IMAGES) <= TOLERANCE


def test_few_runs_are_made():
    graph, made = trace_model(Vit(), *IMAGES), []

    def make() -> nn.Module:
        made.append(1)
        return Vit()

    find_normal_form(graph, make, IMAGES)
    # Five by the proof, four to find another shape that the model takes, two of the rewritten state.
    assert 0 < len(made) <= 11


def test_a_network_without_norms_is_not_run():
    def make() -> nn.Module:
        raise AssertionError("it was run")

    inputs = (torch.randn(2, 1, 8, 8),)
    form = find_normal_form(trace_model(Cnn(), inputs), make, inputs)
    assert (form.rewrites, form.refusals, dict(form.neutral), form.centred) == ((), (), {}, frozenset())


def test_a_model_that_cannot_be_run_proves_nothing():
    def make() -> nn.Module:
        raise RuntimeError("no weights here")

    form = find_normal_form(trace_model(Vit(), *IMAGES), make, IMAGES)
    assert form.rewrites == ()
    assert not form.centred
    assert not form.neutral
    assert all("no weights here" in refusal.reason for refusal in form.refusals)
    assert "block.n1.weight" in {refusal.parameter for refusal in form.refusals}


class Windows(nn.Module):
    """Rows of four tokens behind a norm, the last one filled up with zeros where tokens are missing."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.embed(x))
        missing = -x.shape[1] % 4
        if missing:
            y = nn.functional.pad(y, (0, 0, 0, missing))
        return self.head(y.unflatten(1, (-1, 4))).flatten(1, 2)


def test_what_holds_at_the_traced_shape_only_is_refused():
    inputs = (torch.randn(2, 8, WIDTH),)
    form = found(Windows, inputs)
    assert not any(isinstance(rewrite, Fold) for rewrite in form.rewrites)
    assert "norm.weight" in {refusal.parameter for refusal in form.refusals}
