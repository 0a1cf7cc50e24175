"""The page on heads: its Python runs, and what it says was measured is what its example gives."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergekit_ot.cli.app import main
from mergekit_ot.recipe import make_recipe

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "how-to" / "heads.md").read_text(encoding="utf-8")
EXAMPLE = DOCS / "examples" / "two_heads.py"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


def test_the_python_of_the_page_runs_and_both_classes_give_the_same() -> None:
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for block in blocks("python"):
        exec(block, names)
    assert (names["first"].shape[1], names["second"].shape[1]) == (3, 5)
    inputs = torch.randn(4, 4)
    own = names["BothHeads"](names["net"](3), names["result"].state, (3, 5))(inputs)
    assert all(torch.equal(one, other) for one, other in zip(own, names["both"](inputs), strict=True))


def test_the_recipe_of_the_page_is_one(tmp_path: Path) -> None:
    (tmp_path / "fuse.yaml").write_text(blocks("yaml")[0])
    recipe = make_recipe(tmp_path / "fuse.yaml")
    assert [sorted(rule.keys() - {"parameters"}) for rule in recipe.layers] == [
        ["weights"],
        ["keep"],
        ["weights"],
        ["measure", "solver"],
    ]
    assert make_recipe(models=recipe.models, layers=yaml.safe_load(recipe.to_yaml())["layers"]).layers == recipe.layers


@pytest.mark.slow
def test_what_was_measured_is_what_the_example_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = importlib.util.spec_from_file_location("two_heads", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    monkeypatch.chdir(tmp_path)
    for name, first, seed in (("a.pt", 0, 0), ("b.pt", 5, 1)):
        torch.save(example.trained(first, seed).state_dict(), name)
    fuse = ["fuse", "a.pt", "b.pt", "--arch", f"{EXAMPLE}:net", "--head", "both", "--data", "digits", "--overwrite"]
    evaluate = ["eval", "both.pt", "--arch", f"{EXAMPLE}:net?classes=10", "--data", "digits", "--json"]
    for told, options in (("`--solver wb`", ()), ("`--solver wb --repair refit`", ("--repair", "refit"))):
        for arguments in ([*fuse, "-o", "both.pt", *options], evaluate):
            with pytest.raises(SystemExit) as ended:
                main(arguments)
            assert ended.value.code in (0, None)
        found = json.loads(capsys.readouterr().out.splitlines()[-1])["models"][0]["accuracy"]
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| {told} |"))
        # Training differs from machine to machine in the last digits of its sums.
        assert found == pytest.approx(float(re.findall(r"[\d.]+(?= %)", row)[0]), abs=4.0)
