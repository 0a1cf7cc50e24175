"""Files and folders of data: what is damaged, hostile or does not fit is said in one message, and nothing runs."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mergekit_ot import DataNeeds
from mergekit_ot.errors import DataError
from mergekit_ot.scoring.data_options import DataOptions
from mergekit_ot.sources.datasets import TEST, resolve_data


def read(spec: str, network: nn.Module | None = None, split: str = TEST, **needs: Any) -> list[Any]:
    """Returns the batches of a SPEC, as a network takes them."""
    return list(resolve_data(spec, split=split).for_network(DataNeeds(network, **needs), DataOptions()))


def picture(path: Path, size: tuple[int, int] = (6, 4), value: int = 128) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 0, 255)).save(path)


def test_images_have_the_size_the_channels_and_the_scale_of_the_network(tmp_path: Path) -> None:
    for place, name in enumerate(("cat", "dog", "empty")):
        (tmp_path / "photos" / name).mkdir(parents=True)
        if name != "empty":
            picture(tmp_path / "photos" / name / "a.png", value=51 * place)
    spec = f"{tmp_path}/photos"
    ((inputs, labels),) = read(spec, shape=(3, 4, 6))
    assert inputs.shape == (2, 3, 4, 6)
    assert labels.tolist() == [0, 1]
    assert torch.allclose(inputs[1, :, 0, 0], torch.tensor([0.2, 0.0, 1.0]))
    ((scaled, _),) = read(f"{spec}?size=2&mean=0.5,0,0&std=2", nn.Conv2d(3, 4, 1))
    assert scaled.shape == (2, 3, 2, 2)
    assert torch.allclose(scaled[1, :, 0, 0], torch.tensor([-0.15, 0.0, 0.5]))
    ((grey, _),) = read(spec, nn.Conv2d(1, 4, 1))
    assert grey.shape == (2, 1, 4, 6)


def test_images_of_one_folder_have_no_labels_and_parts_are_told_apart(tmp_path: Path) -> None:
    for count, part in ((1, "val"), (3, "train")):
        for place in range(count):
            picture(tmp_path / part / f"{place}.jpg")
    assert [(len(inputs), labels) for inputs, labels in read(str(tmp_path), split="test")] == [(1, None)]
    assert [len(inputs) for inputs, _ in read(f"{tmp_path}?batch=2", split="train")] == [2, 1]
    with pytest.raises(DataError, match="has no odd part: it has train, val"):
        read(f"{tmp_path}?split=odd")


def test_the_file_beside_a_model_says_how_its_images_are(tmp_path: Path) -> None:
    wishes = {"size": {"height": 2, "width": 3}, "image_mean": [1, 1, 1], "image_std": [2, 2, 2]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(wishes))
    picture(tmp_path / "photos" / "a.png")
    ((inputs, _),) = read(f"{tmp_path}/photos", folders=(tmp_path,))
    assert inputs.shape == (1, 3, 2, 3)
    assert float(inputs.max()) == 0


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("?size=0", "size=0 .*1 to 8192"),
        ("?size=99999", "size=99999"),
        ("?mean=1,2", "mean=.*one per channel"),
        ("?std=0", "none of them zero"),
        ("?channels=4", "images of 4 channels"),
        ("?sise=3", "'sise' .* not known.*size, mean"),
        ("?batch=0", "batch=0"),
        ("", "differ in size .*size="),
    ],
)
def test_what_does_not_fit_images_is_said(tmp_path: Path, query: str, message: str) -> None:
    picture(tmp_path / "photos" / "a.png", (6, 4))
    picture(tmp_path / "photos" / "b.png", (8, 8))
    with pytest.raises(DataError, match=message):
        read(f"{tmp_path}/photos{query}")


@pytest.mark.parametrize(
    "content", [b"", b"no image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(touch run) print\n"]
)
def test_what_is_no_image_is_named_and_not_run(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.png").write_bytes(content)
    with pytest.raises(DataError, match=r"bad.png' cannot be read as an image"):
        read(f"{tmp_path}?size=4")


def test_a_picture_that_unfolds_to_a_wall_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(tmp_path / "wall.png", (40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match=r"wall.png'.*DecompressionBomb"):
        read(f"{tmp_path}?size=4")


def test_a_folder_that_a_script_loads_is_refused(tmp_path: Path) -> None:
    (tmp_path / "squad.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(DataError, match=r"loaded by a script .squad.py.*no code of data is run"):
        read(str(tmp_path))


def test_images_beside_folders_of_images_are_refused(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "cat" / "b.png")
    with pytest.raises(DataError, match=r"images beside folders of images .a.png"):
        read(str(tmp_path))


class Trap:
    def __reduce__(self) -> Any:
        return Path("run").touch, ()


@pytest.mark.parametrize("content", [pickle.dumps(Trap()), b"", b"\x93NUMPY\x01\x00"])
def test_an_array_is_never_unpickled(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"x.npy' is no array of numbers"):
        read("x.npy")
    np.save("y.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"y.npy' is no array of numbers"):
        read("y.npy")
    assert not Path("run").exists()


def test_arrays_and_labels_pair_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", np.arange(6.0).reshape(3, 2))
    np.save("y.npy", np.array([1, 0, 1], np.uint8))
    ((inputs, targets),) = read("x.npy?labels=y.npy&mean=1&std=2")
    assert (inputs.dtype, targets.tolist()) == (torch.float32, [1, 0, 1])
    assert inputs[2].tolist() == [1.5, 2.0]
    np.save("y.npy", np.zeros(2))
    with pytest.raises(DataError, match=r"'x.npy' has 3 rows, and its labels 'y.npy' 2"):
        read("x.npy?labels=y.npy")


def test_a_text_is_read_in_order_and_each_target_is_the_next(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abcabcabcab")
    (tmp_path / "order.json").write_text(json.dumps({"a": 2, "b": 0, "c": 1}))
    ((inputs, targets),) = read(f"{tmp_path}/text.txt?length=3&vocabulary={tmp_path}/order.json", nn.Embedding(3, 2))
    assert inputs.tolist() == [[2, 0, 1]] * 3
    assert targets.tolist() == [[0, 1, 2]] * 3
    told: list[str] = []
    ((inputs, _),) = read(f"{tmp_path}/text.txt?length=5", nn.Embedding(3, 2), notify=told.append)
    assert inputs.tolist() == [[0, 1, 2, 0, 1], [2, 0, 1, 2, 0]]
    assert told == [f"The vocabulary of '{tmp_path}/text.txt?length=5' is its 3 characters, sorted."]
    assert read(f"{tmp_path}/text.txt?length=5&vocabulary=bytes")[0][0][0].tolist() == [97, 98, 99, 97, 98]


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("", "network knows 9 tokens, and the text has 3 different characters.*vocabulary=FILE"),
        ("?vocabulary=nowhere.txt", "no vocabulary 'nowhere.txt'"),
        ("?vocabulary=printable", "network knows 9 tokens, and vocabulary=printable has 100 characters"),
        ("?vocabulary=HERE/few.txt", "character 'c' .*is not in vocabulary="),
        ("?vocabulary=HERE/bad.json", "bad.json' is no valid JSON"),
        ("?tokenizer=nowhere", "no tokenizer.json"),
        ("?tokenizer=HERE", "tokenizer.json' is no tokenizer, or damaged"),
        ("?vocabulary=HERE/all.txt&length=99", "has 11 tokens, and a sequence takes 99"),
        ("?vocab=a", "'vocab' .*not known"),
    ],
)
def test_what_does_not_fit_a_text_is_said(tmp_path: Path, query: str, message: str) -> None:
    (tmp_path / "text.txt").write_text("abcabcabcab")
    for name, content in (("few.txt", "ab"), ("all.txt", "abc"), ("bad.json", "{"), ("tokenizer.json", "[]")):
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        read(f"{tmp_path}/text.txt{query.replace('HERE', str(tmp_path))}", nn.Embedding(9, 2))


def test_tables_of_text_and_of_numbers(tmp_path: Path) -> None:
    rows = ["split\tlabel\ttext", *(f"{part}\t{label}\t{text}" for part, label, text in ROWS)]
    (tmp_path / "t.tsv.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    told: list[str] = []
    batches = read(f"{tmp_path}/t.tsv.gz?vocabulary=ascii", nn.EmbeddingBag(128, 2), notify=told.append)
    assert sorted((inputs.shape, targets.tolist()) for inputs, targets in batches) == [((1, 1), [1]), ((2, 2), [0, 1])]
    assert told[0].endswith(": bad = 0, good = 1.")
    (tmp_path / "n.csv").write_text("a,b,y\n1,2.5,0\n3,4,1\n")
    ((inputs, targets),) = read(f"{tmp_path}/n.csv")
    assert (inputs.tolist(), targets.tolist()) == ([[1, 2.5], [3, 4]], [0, 1])


ROWS = (("train", "good", "abc"), ("test", "bad", "ab"), ("test", "good", "b"), ("test", "good", "ba"))


class Masked(nn.Embedding):
    def forward(self, input: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(input)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(128, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        return self.table(input_ids)


def test_a_network_that_takes_a_mask_gets_texts_of_all_lengths_together(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("text\nabc\na\n")
    (((tokens, mask), targets),) = read(f"{tmp_path}/t.csv?vocabulary=ascii", Named())
    assert tokens.tolist() == [[97, 98, 99], [97, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert targets is None


@pytest.mark.parametrize(
    ("content", "query", "message"),
    [
        ("a,b\n1,x\n", "", "no column called text.*text=COLUMN"),
        ("a,b\n1,2\n", "?label=c", "no column 'c': it has a, b"),
        ("a,b\n1\n", "", "Row 1 .* more or fewer than 2 values"),
        ("a,b\n", "", "no row below"),
        ("split,a\ntrain,1\n", "", "no test part: its column 'split' has train"),
        ("a,text\n1,caf\udce9\n", "", "cannot be read as text"),
    ],
)
def test_what_does_not_fit_a_table_is_said(tmp_path: Path, content: str, query: str, message: str) -> None:
    (tmp_path / "t.csv").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(DataError, match=message):
        read(f"{tmp_path}/t.csv{query}", nn.Embedding(3, 2))


@pytest.mark.parametrize("missing", ["PIL", "datasets"])
def test_a_missing_library_is_named_with_its_extra(
    tmp_path: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import importlib

    whole = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name.partition(".")[0] == missing:
            raise ModuleNotFoundError(f"No module named '{missing}'", name=missing)
        return whole(name, package)

    picture(tmp_path / "photos" / "a.png")
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "state.json").write_text("{}")
    monkeypatch.setattr(importlib, "import_module", without)
    folder = {"PIL": "photos", "datasets": "saved"}[missing]
    name = {"PIL": "Pillow"}.get(missing, missing)
    with pytest.raises(DataError, match=rf"needs {name}, which is not installed: pip install 'mergekit-ot\[data\]'"):
        read(str(tmp_path / folder))


def test_what_is_not_there_or_not_known_is_said(tmp_path: Path) -> None:
    picture(tmp_path / "photos" / "a.png")
    (tmp_path / "odd.bin").write_bytes(b"?")
    cases: Iterable[tuple[str, str]] = (
        (f"{tmp_path}/fotos", "no file or folder .*Did you mean '.*photos'"),
        (f"{tmp_path}/odd.bin", "not known to be data. Name an .npz"),
        ("nowhere.csv", "no file or folder 'nowhere.csv'"),
    )
    for spec, message in cases:
        with pytest.raises(DataError, match=message):
            read(spec)
