"""The harness of the benchmarks: arms in turn, medians of what is counted, memory of each by itself."""

from __future__ import annotations

from pathlib import Path

import contests
import pytest
from contests import OURS, Contest, held, medians, peak_of, table
from peers import MissingPeerError, module, program


class Clock:
    """A clock that only arms move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.runs: list[str] = []

    def arm(self, name: str, *seconds: float):
        left = list(seconds)

        def work() -> str:
            self.runs.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]
            return name

        return work


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(contests, "cpu_seconds", lambda: clock.now)
    return clock


def test_arms_run_in_turn_and_the_median_of_the_counted_rounds_is_told(clock: Clock) -> None:
    arms = {OURS: clock.arm(OURS, 99.0, 1.0, 5.0, 3.0), "theirs": clock.arm("theirs", 0.0, 2.0)}
    assert medians(arms, rounds=3) == {OURS: 3.0, "theirs": 2.0}
    assert clock.runs == [OURS, "theirs"] * 4


def test_a_row_tells_our_time_over_theirs(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contests, "peak_of", lambda work: {OURS: 7.0, "theirs": 9.0}[work()])
    arms = {OURS: clock.arm(OURS, 1.0), "theirs": clock.arm("theirs", 4.0)}
    (row,) = held(Contest("work", arms, lambda found: " beats ".join(found.values())))
    assert (row.ratio, row.seconds, row.our_peak_mib, row.peak_mib) == (0.25, 4.0, 7.0, 9.0)
    assert table([row]).splitlines()[2] == "| work | theirs | 4 | 0.25 | 7 / 9 | ours beats theirs |"


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory cannot be counted anew here")
def test_memory_is_that_of_the_work_alone() -> None:
    before = bytearray(80 << 20)
    before[::4096] = b"1" * len(before[::4096])
    assert 45 < peak_of(lambda: b"1" * (50 << 20)) < 70
    assert peak_of(lambda: None) < 20


def test_a_missing_peer_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MERGEOT_PEERS", raising=False)
    with pytest.raises(MissingPeerError, match="MERGEOT_PEERS"):
        module("site", "rebasin")
    monkeypatch.setenv("MERGEOT_PEERS", str(tmp_path))
    with pytest.raises(MissingPeerError, match="no_such_peer"):
        module("site", "no_such_peer")
    with pytest.raises(MissingPeerError, match="is not there"):
        program("mergekit", "mergekit-yaml")


def test_modules_of_one_peer_do_not_stand_in_the_way_of_another(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for place in ("one", "other"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "peer_helpers.py").write_text(f"name = '{place}'\n")
        (tmp_path / place / "peer_main.py").write_text("from peer_helpers import name\nprint(name)\n")
    monkeypatch.setenv("MERGEOT_PEERS", str(tmp_path))
    assert [module(place, "peer_main").name for place in ("one", "other")] == ["one", "other"]
