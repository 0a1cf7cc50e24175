"""Every example of docs/examples runs and prints what its page says; those of other tools where they are installed."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "docs" / "examples"
PAGE = (EXAMPLES / "README.md").read_text(encoding="utf-8")
FAST = ("mlp", "three_sources", "fuse_clients")
# With the passes that a test gives them; BatchNorm's running statistics need all of theirs.
SLOW = {"different_widths": 1, "cnn_batchnorm": 6, "lstm": 3, "transformer": 2, "custom_architecture": 3}
OF_TOOLS = {"flower_strategy": "flwr", "lightning_callback": "lightning"}
# Those that a test of their own page runs.
ELSEWHERE = {"two_heads", "axis_algebra_pictures", "transformer_pictures"}
MOST_LINES = 61


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Imports examples as a script beside them would; none stays imported."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)


def example(name: str) -> ModuleType:
    return importlib.import_module(name)


def printed(name: str) -> dict[str, float]:
    """Returns what the page says that an example prints."""
    block = re.search(rf"^python docs/examples/{name}\.py\n```\n+```text\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert block is not None, name
    rows = re.findall(r"^(.+?) +([\d.]+)(?: %)?$", block[1], re.MULTILINE)
    assert len(rows) == len(block[1].splitlines())
    return {row: float(number) for row, number in rows}


def test_every_example_is_listed_run_and_short() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {*FAST, *SLOW, *OF_TOOLS, *ELSEWHERE}
    for name in sorted(names):
        assert f"({name}.py)" in PAGE
        if name not in ELSEWHERE:
            assert len((EXAMPLES / f"{name}.py").read_text(encoding="utf-8").splitlines()) < MOST_LINES


@pytest.mark.parametrize("name", FAST)
def test_a_fast_example_gives_the_rows_of_its_page(name: str) -> None:
    found = example(name).main(epochs=1)
    assert list(found) == list(printed(name))
    assert all(0 <= value <= 100 for value in found.values())


@pytest.mark.slow
@pytest.mark.parametrize(("name", "epochs"), SLOW.items())
def test_a_slow_example_gives_the_rows_of_its_page(name: str, epochs: int) -> None:
    found = example(name).main(epochs)
    assert list(found) == list(printed(name))
    # After few passes nothing is as good as on the page; what is fitted comes near its sources all the same.
    first, *_, last = found.values()
    assert last > 0.7 * first


@pytest.mark.slow
def test_what_an_example_prints_is_what_its_page_says() -> None:
    found = example("mlp").main()
    # Training differs from machine to machine in the last digits of its sums; the plain average differs wildly.
    expected = {row: number for row, number in printed("mlp").items() if row != "average"}
    assert {row: found[row] for row in expected} == pytest.approx(expected, abs=4.0)
    assert found["average"] < found["weight-matching"] < found["with refit"] + 2


def test_a_server_takes_clients_of_other_widths_and_counts_their_samples() -> None:
    clients = example("fuse_clients")
    states = [clients.net(width).state_dict() for width in (8, 12)]
    alone = clients.fused_clients(states, (5, 0), 8, [batch for batch, _ in clients.TRAIN[:2]])
    inputs = clients.TRAIN[0][0]
    # A client without samples counts nothing: the server has the function of the other.
    assert torch.allclose(alone.model()(inputs), clients.loaded(states[0])(inputs), atol=1e-3)
    wider = clients.fused_clients(states, (1, 3), 20, [batch for batch, _ in clients.TRAIN[:2]])
    assert wider.state["1.weight"].shape == (20, 64)


def test_the_strategy_runs_in_the_loop_of_flower() -> None:
    """Its own server loop and messages, with clients that answer in this process; one of them fails."""
    app = pytest.importorskip("flwr.app")
    grid = pytest.importorskip("flwr.serverapp").Grid
    identity = pytest.importorskip("flwr.supercore.task_identity").TaskIdentity
    module = example("flower_strategy")

    class InProcess(grid):
        run = set_run = create_message = push_messages = pull_messages = None

        def get_node_ids(self) -> list[int]:
            return [0, 1, 2]

        def send_and_receive(self, messages: Iterable[Any], **_: object) -> list[Any]:
            return [self.answer(message, message.metadata.dst_node_id) for message in messages]

        def answer(self, message: Any, number: int) -> Any:
            if number == 2:
                return app.Message(app.Error(code=0, reason="gone"), reply_to=message)
            state, samples = module.trained(number, 1)
            content = {"arrays": app.ArrayRecord(state), "metrics": app.MetricRecord({"num-examples": samples})}
            return app.Message(app.RecordDict(content), reply_to=message)

    # What a ServerApp's process knows of itself.
    identity.run_id = identity.task_id = 1
    identity.node_id = 0
    strategy = module.FuseClients(20, [images for images, _ in module.TRAIN[9:]], fraction_evaluate=0.0)
    start = app.ArrayRecord(example("fuse_clients").net(20).state_dict())
    fused = strategy.start(grid=InProcess(), initial_arrays=start, num_rounds=1).arrays.to_torch_state_dict()
    assert fused["1.weight"].shape == (20, 64)
    assert not torch.equal(fused["1.weight"], start.to_torch_state_dict()["1.weight"])
    assert strategy.aggregate_train(2, []) == (None, None)


def test_the_callback_fuses_at_the_end_of_a_run_of_lightning() -> None:
    pytest.importorskip("lightning")
    found = example("lightning_callback").main(epochs=1)
    assert list(found) == list(printed("lightning_callback"))
