"""The README: its Python runs on modules of the reader's own, its commands exist, and it stays short."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import torch
import typer
from reader import blocks
from torch import nn

from mergekit_ot import default_manager
from mergekit_ot.cli.app import build_app

PAGE = Path(__file__).parent.parent / "README.md"


def own_module() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 3))


def test_its_python_fuses_two_modules_of_the_reader() -> None:
    torch.manual_seed(0)
    inputs = torch.randn(400, 8)
    names: dict[str, Any] = {"first": own_module(), "second": own_module(), "batches": [inputs[:200], inputs[200:]]}
    (code,) = [text for language, _, text in blocks(PAGE) if language == "python"]
    exec(code, names)
    sources = [names["first"].eval(), names["second"].eval()]
    with torch.no_grad():
        ensemble = sum(model(inputs) for model in sources) / 2
        distances = [(model(inputs) - ensemble).square().mean() for model in (names["model"], *sources)]
    assert distances[0] < min(distances[1:])


def test_its_commands_have_flags_that_exist() -> None:
    program = typer.main.get_command(build_app(default_manager()))
    lines = "\n".join(text for language, _, text in blocks(PAGE) if language == "bash").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("mergeot ")]
    assert len(commands) >= 2
    for _, command, *words in commands:
        flags = {name for parameter in program.commands[command].params for name in parameter.opts}
        assert {word for word in words if word.startswith("-")} <= flags


def test_it_is_one_screen_and_a_half() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert len(re.findall(r"^<!-- command: (?:main|test) -->$", text, re.MULTILINE)) == 2
