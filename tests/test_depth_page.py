"""The page on depth: its Python runs, and what its messages say is what is said."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

PAGE = (Path(__file__).parents[1] / "docs" / "how-to" / "depth.md").read_text(encoding="utf-8")


def test_the_python_of_the_page_runs_and_the_deepened_network_computes_the_same() -> None:
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for block in re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL):
        exec(block, names)
    assert len(names["deepening"].inserted) == len(names["deepened"].inserted) == 2
    inputs = torch.randn(6, 4)
    with torch.no_grad():
        assert torch.equal(names["model"](inputs), names["small"](inputs))


def test_the_messages_of_the_page_are_those_of_the_code() -> None:
    sources = (Path(__file__).parents[1] / "mergekit_ot" / "fusion" / "depth").glob("*.py")
    code = re.sub(r'"\s*f?"', "", "".join(path.read_text(encoding="utf-8") for path in sources))
    said = " ".join(PAGE.split())
    for words in (
        "Sources differ in depth: the fused network is as deep as the deepest, and has the sizes of",
        "that compute nothing were added",
        "these layers do not only add to a residual stream, but replace or normalise it. Such networks cannot be fused",
    ):
        assert words in said
        assert words in code
