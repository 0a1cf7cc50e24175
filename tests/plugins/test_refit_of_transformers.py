"""Decoders of the library transformers are refitted as streams."""

from __future__ import annotations

import pytest
import torch
from mergeot_repair.programs.maps import MapFinder
from mergeot_repair.streams.finding import StreamFinder
from torch import Tensor, nn

from mergekit_ot import FusionResult, RepairContext, fuse

pytestmark = pytest.mark.slow

_VOCABULARY, _LENGTH = 11, 6
_KINDS = pytest.mark.parametrize("kind", ["gpt2", "llama"])


def _net(kind: str, seed: int) -> nn.Module:
    library = pytest.importorskip("transformers")
    torch.manual_seed(seed)
    if kind == "gpt2":
        config = library.GPT2Config(
            vocab_size=_VOCABULARY, n_positions=_LENGTH, n_embd=16, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
        )
        net = library.GPT2LMHeadModel(config).eval()
    else:
        config = library.LlamaConfig(
            vocab_size=_VOCABULARY,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=_LENGTH,
            bos_token_id=0,
            eos_token_id=0,
        )
        net = library.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 2:
                parameter.mul_(15)
    return net


def _tokens(count: int) -> Tensor:
    return torch.randint(0, _VOCABULARY, (count, _LENGTH), generator=torch.Generator().manual_seed(3))


def _context(kind: str) -> RepairContext:
    tokens = _tokens(50)
    result = fuse([_net(kind, 0), _net(kind, 1)], solver="average", example_inputs=tokens, device="cpu")
    return result.repair_context(result.state, (0.5, 0.5), [(tokens,)])


def _refitted(kind: str, seeds: tuple[int, int]) -> FusionResult:
    nets = [_net(kind, seed) for seed in seeds]
    return fuse(nets, solver="average", data=[_tokens(600)], device="cpu", repair="refit")


@_KINDS
def test_their_stream_is_found(kind: str) -> None:
    context = _context(kind)
    maps = MapFinder(context.program).find()
    (stream,) = StreamFinder(context, maps).find()
    # Attention and feed-forward layers of two blocks, and the head.
    assert (len(stream.points), len(stream.roles.writers)) == (5, 4)
    assert (stream.roles.tie is not None) == (kind == "gpt2")


def test_weights_with_inputs_first_are_those_of_gpt_2() -> None:
    maps = MapFinder(_context("gpt2").program).find()
    assert {each.weight for each in maps if each.is_turned} == {
        f"transformer.h.{number}.{name}.weight"
        for number in (0, 1)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }


@_KINDS
def test_they_come_nearer_to_the_mean_of_the_sources(kind: str) -> None:
    comparison = _refitted(kind, (0, 1)).repair_comparison
    assert comparison is not None
    assert comparison.is_written
    assert comparison.repaired.plain < 0.7 * comparison.unrepaired.plain


@_KINDS
def test_one_fused_with_itself_stays(kind: str) -> None:
    comparison = _refitted(kind, (0, 0)).repair_comparison
    assert comparison is not None
    assert comparison.repaired.plain < 1e-3
