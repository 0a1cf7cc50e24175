"""The model card of a folder: what was merged, how, and how to do it again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

CARD = "README.md"
_HEAD = """---
library_name: transformers
tags:
- merge
- mergeot
---

"""


def model_card(folder: Path, metadata: Mapping[str, Any]) -> str:
    """Returns the text of the card.

    Args:
        folder: The folder whose sizes, tokenizer and configuration the model has.
        metadata: What `mergekit_ot.save_checkpoint` was told, with the provenance.
    """
    facts: Mapping[str, Any] = metadata.get("provenance") or {}
    body = _aligned(folder, facts) if "aligned_to" in facts else _fused(folder, facts)
    return f"{_HEAD}{body}\n"


def _aligned(folder: Path, facts: Mapping[str, Any]) -> str:
    name, reference = _inline(folder.absolute().name), _inline(facts["aligned_to"])
    return "\n".join(
        [
            f"# {name}, aligned to {reference}",
            "",
            f"It computes what {name} computes. Its neurons stand in the order of {reference}, so that any tool that "
            "averages weights can merge the two.",
            "",
            f"- source: {name}, SHA-256 `{_inline(facts.get('sha256', ''))}`",
            f"- solver: {_inline(facts.get('solver', ''))}",
            f"- command: `mergeot align {reference} {name} -o … --solver {_inline(facts.get('solver', ''))}`",
        ]
    )


def _fused(folder: Path, facts: Mapping[str, Any]) -> str:
    sources = [each for each in facts.get("sources") or [] if isinstance(each, Mapping)]
    name = _inline(folder.absolute().name)
    lines = [
        "# Merged model",
        "",
        "Weights of independently trained models, whose neurons were first matched by optimal transport. "
        f"Configuration and tokenizer are those of {name}.",
        "",
    ]
    if sources:
        lines += ["| source | weight | SHA-256 of its weights |", "|---|---|---|"]
        for source in sources:
            weight = source.get("weight", "")
            shown = f"{weight:.4g}" if isinstance(weight, int | float) else _inline(weight)
            lines.append(f"| {_inline(source.get('name', ''))} | {shown} | `{_inline(source.get('sha256', ''))}` |")
        lines += ["", "Written by:", "", "```bash", _command(sources, facts), "```"]
    error = facts.get("aligned_sources_max_error")
    if isinstance(error, int | float):
        lines += ["", f"Every aligned source computes what the source computes, to a relative error of {error:.1e}."]
    made_by = facts.get("made_by")
    if made_by:
        lines += ["", f"Made by {_inline(made_by)}."]
    return "\n".join(lines)


def _command(sources: list[Mapping[str, Any]], facts: Mapping[str, Any]) -> str:
    """Returns the command that writes the same again, with the names of the sources alone."""
    words = ["mergeot fuse", *(_inline(source.get("name", "")) for source in sources), "-o merged"]
    weights = [source.get("weight") for source in sources]
    if len(set(map(str, weights))) > 1:
        words.append(f"--model-weights {','.join(map(str, weights))}")
    for key, flag, default in (
        ("solver", "--solver", None),
        ("measure", "--measure", None),
        ("repair", "--repair", "none"),
        ("restarts", "--restarts", 1),
        ("seed", "--seed", 0),
        ("target", "--target", 0),
    ):
        value = facts.get(key)
        if value not in (None, default):
            words.append(f"{flag} {_inline(value)}")
    if facts.get("refine"):
        words.append("--refine")
    return " ".join(words)


def _inline(value: object) -> str:
    """Returns a value as text that stays in its place in Markdown."""
    return "".join(char for char in str(value)[:300] if char.isprintable() and char not in "`|<>")
