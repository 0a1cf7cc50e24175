"""Small rules of storage: where nothing is written, what is no state, and what a failure leaves unfinished."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergekit_ot import CheckpointError, load_checkpoint
from mergekit_ot.storage.outputs import check_output
from mergekit_ot.storage.record import FORMAT, VERSION
from mergekit_ot.storage.state_dicts import find_state
from mergekit_ot.storage.torch_format import TorchWriter


def test_nothing_is_written_into_a_folder_that_is_read_as_a_whole(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    (shards / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(shards)
    for name in ("shards/out.pt", "shards/inner/out.pt", "link/out.pt"):
        with pytest.raises(CheckpointError, match="stands in the input"):
            check_output(tmp_path / name, [shards])
    check_output(tmp_path / "out.pt", [shards])


def test_numbers_that_were_measured_are_no_state_however_many() -> None:
    measured = {name: torch.tensor(1.0) for name in ("loss", "accuracy", "rate")}
    found = find_state({"measured": measured, "first": {"weight": torch.zeros(2, 3)}})
    assert found is not None
    assert list(found.state) == ["weight"]


def test_a_writer_is_left_unfinished_where_its_block_raises(tmp_path: Path) -> None:
    path = tmp_path / "out.pt"

    def write_half() -> None:
        with TorchWriter(path, {}) as writer:
            writer.write("weight", torch.zeros(2))
            raise RuntimeError("half of it")

    with pytest.raises(RuntimeError, match="half"):
        write_half()
    assert not path.exists()


@pytest.mark.parametrize("more", [0, 1])
def test_a_file_of_a_newer_version_is_refused(tmp_path: Path, more: int) -> None:
    content = {"format": FORMAT, "version": VERSION + more, "state_dict": {"weight": torch.zeros(2)}}
    torch.save(content, tmp_path / "net.pt")
    if more:
        with pytest.raises(CheckpointError, match="written by a newer version"):
            load_checkpoint(tmp_path / "net.pt")
    else:
        assert list(load_checkpoint(tmp_path / "net.pt").state) == ["weight"]
