"""Batches of every form are taken apart, brought to one length, and described in words; metrics and devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mergekit_ot import Metric, evaluate, fuse
from mergekit_ot.errors import ArchitectureError, DataError, MergeotError, RecipeError
from mergekit_ot.fusion.alike import alike, brought_to
from mergekit_ot.fusion.samples import read_samples
from mergekit_ot.scoring.batches import IGNORED, BatchReader, ForwardArguments, forward_arguments
from mergekit_ot.scoring.metrics import top
from mergekit_ot.sources.datasets import resolve_data
from mergekit_ot.sources.described import described_inputs, read_input
from mergekit_ot.sources.metrics import resolve_metric
from mergekit_ot.sources.samples import batched

TOKENS, MASK, LABELS = torch.arange(12).reshape(3, 4), torch.ones(3, 4).long(), torch.tensor([0, 1, 1])
PIXELS = torch.rand(3, 2)


def reader(*names: str, needed: int = 1, **keys: str) -> BatchReader:
    return BatchReader(ForwardArguments(names, needed), **keys)  # type: ignore[arg-type]


def same(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, tuple):
        return isinstance(found, tuple) and all(same(one, other) for one, other in zip(found, wanted, strict=True))
    return found is wanted or (wanted is not None and torch.equal(found, wanted))


@pytest.mark.parametrize(
    ("item", "names", "needed", "inputs", "targets"),
    [
        (PIXELS, ("x",), 1, PIXELS, None),
        (PIXELS.numpy(), ("x",), 1, PIXELS, None),
        ((PIXELS,), ("x",), 1, PIXELS, None),
        ((PIXELS, LABELS), ("x",), 1, PIXELS, LABELS),
        ([PIXELS, LABELS, MASK], ("x",), 1, PIXELS, LABELS),
        ((PIXELS, LABELS, MASK), ("x", "t"), 2, (PIXELS, LABELS), MASK),
        ((PIXELS, LABELS), ("x", "t"), 2, (PIXELS, LABELS), None),
        (((PIXELS, LABELS), MASK), ("x", "t"), 2, (PIXELS, LABELS), MASK),
        (((PIXELS, LABELS), None), ("x", "t"), 2, (PIXELS, LABELS), None),
        ({"image": PIXELS, "label": LABELS}, ("x",), 1, PIXELS, LABELS),
        ({"label": LABELS, "x": PIXELS}, ("x",), 1, PIXELS, LABELS),
        ({"attention_mask": MASK, "input_ids": TOKENS}, ("input_ids", "attention_mask"), 1, (TOKENS, MASK), None),
        (({"input_ids": TOKENS}, LABELS), ("input_ids", "attention_mask"), 1, TOKENS, LABELS),
        # What forward needs is an input, whatever it is called.
        ({"x": PIXELS, "y": MASK, "label": LABELS}, ("x", "y"), 2, (PIXELS, MASK), LABELS),
    ],
)
def test_inputs_and_targets_of_a_batch(item: Any, names: tuple[str, ...], needed: int, inputs: Any, targets: Any):
    taken = reader(*names, needed=needed).take(item, 0)
    assert same(taken[0], inputs)
    assert same(taken[1], targets)
    # What was taken apart once is taken apart in the same way again.
    assert same(reader(*names, needed=needed).take(taken, 0), taken)


def test_keys_choose_entries_of_dictionaries_and_tuples() -> None:
    chosen = reader("x", input_key="photo,mask", label_key="kind")
    assert same(chosen.take({"mask": MASK, "kind": LABELS, "photo": PIXELS}, 0), ((PIXELS, MASK), LABELS))
    placed = reader("x", input_key="2", label_key="0")
    assert same(placed.take((LABELS, MASK, PIXELS), 0), (PIXELS, LABELS))


@pytest.mark.parametrize(
    ("item", "keys", "message"),
    [
        ({"photo": PIXELS, "kind": LABELS}, {}, r"photo, kind.*forward takes x, mask.*--input-key"),
        ({"mask": MASK}, {}, "'x' stands before"),
        ({"x": PIXELS}, {"label_key": "kind"}, "no 'kind': it has x. Correct --label-key"),
        ({"x": PIXELS}, {"input_key": "photo"}, "no 'photo': it has x. Correct --input-key"),
        (([["text"]], LABELS), {}, "Batch 4 .* has list where a tensor is needed"),
        ("text", {}, "has str where a tensor is needed"),
        ((), {}, "is empty"),
    ],
)
def test_what_cannot_be_told_is_said(item: Any, keys: dict[str, str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        reader("x", "mask", **keys).take(item, 4)


def test_labels_that_repeat_the_tokens_are_those_of_the_next() -> None:
    said: list[str] = []
    taking = reader("input_ids", "labels")
    taking.notify = said.append
    labels = TOKENS.clone()
    labels[0, 2] = IGNORED
    _, targets = taking.take({"input_ids": TOKENS, "labels": labels}, 0)
    assert targets is not None
    assert targets[1].tolist() == [*TOKENS[1, 1:].tolist(), IGNORED]
    assert targets[0].tolist() == [1, IGNORED, 3, IGNORED]
    assert len(said) == 1
    assert "predicts the next" in said[0]
    # Targets that somebody gives beside the inputs are taken as they are.
    assert same(taking.take(({"input_ids": TOKENS}, TOKENS), 0), (TOKENS, TOKENS))


@given(st.lists(st.integers(1, 6), min_size=2, max_size=6), st.integers(0, 5))
def test_sequences_come_to_one_length_and_lose_nothing_where_there_is_a_mask(lengths: list[int], seed: int) -> None:
    drawn = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(1, 9, (2, length), generator=drawn) for length in lengths]
    padded, _ = alike([(each, torch.ones_like(each)) for each in tokens]) or ([], "")
    assert {part.shape for inputs in padded for part in inputs} == {(2, max(lengths))}
    for each, (whole, mask) in zip(tokens, padded, strict=True):
        assert torch.equal(whole[mask.bool()], each.flatten())
        assert same(brought_to((each, torch.ones_like(each)), [(max(lengths),)] * 2), (whole, mask))
    cut, _ = alike([(each,) for each in tokens]) or ([], "")
    length = cut[0][0].shape[1]
    kept = sum(2 * length for inputs in cut)
    assert all(inputs[0].shape[1] == length for inputs in cut)
    assert kept == max(2 * size * sum(other >= size for other in lengths) for size in lengths)


@pytest.mark.parametrize(
    ("shapes", "kept"),
    [
        ([(4, 3, 8, 8), (2, 3, 6, 8)], (4, 3, 8, 8)),
        ([(1, 5, 7), (4, 9, 7)], (4, 9, 7)),
        ([(4, 3, 8, 8), (2, 1, 8, 8)], None),
        ([(4, 6), (4, 5)], None),
        ([(4, 5, 7), (4, 9, 6)], None),
    ],
)
def test_the_commonest_size_is_kept_and_another_kind_refused(shapes: list[tuple[int, ...]], kept: Any) -> None:
    found = alike([(torch.rand(shape),) for shape in shapes])
    assert (None if found is None else found[0][0][0].shape) == kept


def test_calibration_says_what_it_did_to_lengths() -> None:
    data = [torch.randint(9, (4, length)) for length in (5, 3, 5)]
    (samples,), notes = read_samples(data, 100)
    assert samples.shape == (8, 5)
    assert "3 to 5 tokens without a mask are cut to the first 5: 8 of 12" in notes[0]


def test_a_fusion_takes_dictionaries_and_inputs_alone() -> None:
    nets = [nn.Sequential(nn.Linear(2, 6), nn.ReLU(), nn.Linear(6, 2)) for _ in range(2)]
    inputs = torch.rand(40, 2)
    forms = ([inputs], [(inputs, LABELS)], [{"input": inputs, "kind": LABELS}])
    states = [fuse(nets, solver="activation-matching", data=data).state for data in forms]
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())


def test_targets_that_are_ignored_count_for_nothing() -> None:
    net = nn.Embedding(9, 9)
    targets = torch.randint(9, (3, 4))
    some = targets.clone()
    some[:, 2:] = IGNORED
    tokens = torch.randint(9, (3, 4))
    scored, wanted = evaluate(net, [(tokens, some)]), evaluate(net, [(tokens[:, :2], targets[:, :2])])
    assert scored == wanted
    assert scored.perplexity == pytest.approx(float(np.exp(scored.loss)))
    with pytest.raises(DataError, match="Every target of the data is -100"):
        evaluate(net, [(tokens, torch.full_like(targets, IGNORED))])


def test_inputs_alone_cannot_be_scored() -> None:
    with pytest.raises(DataError, match=r"inputs and no targets.*--label-key"):
        evaluate(nn.Linear(2, 3), [PIXELS])


class Largest:
    """The largest output that was seen, as metrics of other libraries are made."""

    def __init__(self, sign: int = 1) -> None:
        self.sign, self.found = sign, -float("inf")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.found = max(self.found, float((self.sign * outputs).max()))

    def compute(self) -> Tensor:
        return torch.tensor(self.found)


def test_metrics_of_both_forms_and_the_likeliest_classes() -> None:
    torch.manual_seed(0)
    outputs, targets = torch.randn(50, 7), torch.randint(7, (50,))
    data = list(zip(outputs.split(20), targets.split(20), strict=True))
    loss = Metric("cross", lambda: nn.functional.cross_entropy)
    scored = evaluate(nn.Identity(), data, metrics=[loss, Metric("largest", Largest), top(3), top(7)])
    assert scored.metrics["cross"] == pytest.approx(scored.loss, rel=1e-5)
    assert scored.metrics["largest"] == float(outputs.max())
    ranks = (outputs > outputs.gather(1, targets[:, None])).sum(1)
    assert scored.metrics["top_3"] == pytest.approx(100 * float((ranks < 3).float().mean()))
    assert scored.metrics["top_7"] == 100
    assert scored.as_json()["largest"] == float(outputs.max())


def test_metrics_by_name(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\nnumber = 3\n\ndef off(outputs, targets, by=1):\n    return torch.tensor(float(by))\n"
        "\ndef wrong(outputs, targets):\n    return 'many'\n"
    )
    place = f"{tmp_path}/own.py"
    data = [(torch.zeros(4, 2), torch.zeros(4, 2))]
    assert evaluate(nn.Identity(), data, metrics=[resolve_metric(f"{place}:off?by=2")]).metrics == {"off": 2.0}
    with pytest.raises(DataError, match=r"Metric 'wrong' raised ValueError.*outputs \(4, 2\)"):
        evaluate(nn.Identity(), data, metrics=[resolve_metric(f"{place}:wrong")])
    for spec, said in (("accuracy", "names no metric"), (f"{place}:of", "Did you mean '.*:off'")):
        with pytest.raises(RecipeError, match=said):
            resolve_metric(spec)
    with pytest.raises(RecipeError, match="is a int, which measures nothing"):
        resolve_metric(f"{place}:number").make()


@pytest.mark.parametrize(
    ("text", "shape", "kind"),
    [
        ("x=1,8,8", (2, 1, 8, 8), torch.float32),
        ("1,8,8", (2, 1, 8, 8), torch.float32),
        ("t=int:7", (2,), torch.int64),
        ("t=int:7:5", (2, 5), torch.int64),
        ("m=bool:5", (2, 5), torch.bool),
        ("t=float", (2,), torch.float32),
    ],
)
def test_an_input_in_words(text: str, shape: tuple[int, ...], kind: torch.dtype) -> None:
    drawn = read_input(text).draw(torch.Generator().manual_seed(0))
    assert (drawn.shape, drawn.dtype) == (shape, kind)
    assert kind is not torch.int64 or (int(drawn.min()) >= 0 and int(drawn.max()) < 7)


@pytest.mark.parametrize(
    "text",
    ["", "x=", "=3", "x=0,3", "x=-1", "x=int:0", "x=int:a", "x=int:3:4:5", "x=what:3", "x=1,,3", "x=99999,99999"],
)
def test_what_describes_no_input_is_refused(text: str) -> None:
    with pytest.raises(MergeotError, match="--input"):
        read_input(text)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["x=3", "s=3"], "no such argument: forward takes x, t"),
        (["x=3", "x=4"], "says twice what 'x' is"),
        (["x=3"], "Nothing is said of the input 't'.*--input t=SHAPE"),
    ],
)
def test_descriptions_name_what_forward_takes(texts: list[str], message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        described_inputs(texts, ForwardArguments(("x", "t"), 2))


def test_arguments_of_forward() -> None:
    assert forward_arguments(nn.Bilinear(2, 3, 4)) == ForwardArguments(("input1", "input2"), 2)
    assert forward_arguments(nn.GRU(2, 3)) == ForwardArguments(("input", "hx"), 1)


class Samples(torch.utils.data.Dataset):
    """Sequences of different lengths, with a number each."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, place: int) -> tuple[Tensor, int]:
        return torch.full((1 + place % 2,), place), place


def test_samples_of_a_data_set_are_put_together() -> None:
    lengths = [(len(inputs), inputs.shape[1]) for inputs, _ in batched(Samples(), "test")]
    assert lengths == [(1, 1), (1, 2), (1, 1), (1, 2), (1, 1)]
    shuffled = [int(targets) for _, targets in batched(Samples(), "train")]
    assert sorted(shuffled) == list(range(5))
    assert shuffled != list(range(5))
    with pytest.raises(DataError, match=r"the first is a object.*ToTensor"):
        list(batched([object()], "test"))  # type: ignore[arg-type]


def test_a_class_of_samples_is_data(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import torch\n\nclass Own(torch.utils.data.Dataset):\n    def __init__(self, count=3):\n"
        "        self.count = count\n\n    def __len__(self):\n        return self.count\n\n"
        "    def __getitem__(self, place):\n        return {'image': torch.zeros(2), 'label': place}\n\nown = Own(2)\n"
    )
    for name, count in (("Own?count=4", 4), ("own", 2)):
        (batch,) = resolve_data(f"{tmp_path}/own.py:{name}")()
        assert batch["label"].tolist() == list(range(count))  # type: ignore[call-overload]
