"""Draws the pictures of docs/explanation/transformers.md: python docs/examples/transformer_pictures.py [FOLDER]."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mergekit_ot.pictures.svg import arrow, box, document, text

FOLDER = Path(__file__).parents[1] / "pictures"
_HEIGHT = 24.0
_CELL = 16.0


def labelled(x: float, y: float, width: float, content: str, kind: str = "") -> str:
    """Returns a box with a line of text in its middle; `x` is that middle."""
    return box(x - width / 2, y, width, _HEIGHT, kind) + text(x, y + 16, content)


def straight(x: float, start: float, end: float, title: str, kind: str = "") -> str:
    """Returns an arrow straight up or down."""
    return arrow(f"M{x:.1f},{start:.1f} L{x:.1f},{end:.1f}", title, kind)


def branch(x: float, readers: Sequence[str], inside: str, writer: str) -> Iterator[str]:
    """Yields a branch: from the stream through a norm up to what reads it, and down to it through what writes it."""
    width, middle = 96.0, x + 54 * (len(readers) - 1)
    last = x + 108 * len(readers) + 20
    yield straight(middle, 250, 232, "read", "back")
    yield labelled(middle, 206, 60, "norm", "plain")
    for number, reader in enumerate(readers):
        place = x + 108 * number
        yield arrow(f"M{middle:.1f},206 L{place:.1f},180", reader, "back")
        yield labelled(place, 154, width, reader)
        yield straight(place, 154, 126, inside)
    yield labelled((x + last) / 2, 100, last - x + width, inside, "plain")
    yield straight(last, 126, 152, writer)
    yield labelled(last, 154, 126, writer)
    yield straight(last, 180, 248, "written")


def stream() -> str:
    """Returns the picture of a residual stream with everything that writes and reads it."""
    elements = [
        box(20, 250, 1010, 30, "stream"),
        text(525, 269, "residual stream   x → T x"),
        *branch(70, ["q → U q T⁻¹", "k → U k T⁻¹", "v → V v T⁻¹"], "attention of one head", "o → T o V⁻¹"),
        *branch(610, ["up → P up T⁻¹"], "activation", "down → T down P⁻¹"),
        straight(960, 250, 232, "read", "back"),
        labelled(960, 206, 60, "norm", "plain"),
        straight(960, 206, 182, "read", "back"),
        labelled(960, 154, 128, "head → head T⁻¹"),
        straight(960, 154, 126, "logits"),
        text(960, 118, "logits"),
        straight(120, 316, 282, "written"),
        labelled(120, 318, 176, "embedding → T embedding"),
        straight(330, 316, 282, "written"),
        labelled(330, 318, 176, "positions → T positions"),
        text(450, 334, "T, U, V: rotations of the stream and of one head;  P: an order of neurons", is_middle=False),
        text(24, 30, "What may be done to a transformer in normal form, so that it computes the same", is_middle=False),
        text(24, 48, "black arrows write to the stream, blue ones read it", is_small=True, is_middle=False),
    ]
    return document(1050, 366, elements)


def cells(x: float, y: float, kinds: Sequence[str]) -> str:
    """Returns squares side by side, each of a class of the style sheet."""
    return "".join(
        f'<rect class="{kind}" x="{x + number * _CELL:.1f}" y="{y:.1f}" width="{_CELL - 2}" height="{_CELL - 2}"/>'
        for number, kind in enumerate(kinds)
    )


def row(y: float, title: str, kinds: tuple[Sequence[str], Sequence[str]], middle: str, fused: Sequence[str]) -> str:
    """Returns a row: what the two sources have, what is done with it, and what the fused network has."""
    ours, theirs = kinds
    end = 150 + (len(ours) + len(theirs)) * _CELL + 18
    return "".join(
        [
            text(24, y + 11, title, is_middle=False),
            cells(150, y, ours),
            cells(150 + len(ours) * _CELL + 10, y, theirs),
            arrow(f"M{end:.1f},{y + 7:.1f} L568,{y + 7:.1f}", middle),
            text((end + 568) / 2, y - 3, middle, is_small=True),
            cells(580, y, fused),
        ]
    )


def refit() -> str:
    """Returns the picture of what the repair ``refit`` makes of two sources."""
    kept, dropped = "band", "plain"
    elements = [
        text(24, 30, "What refit takes from two sources of one size", is_middle=False),
        text(150, 56, "of A, and beside it of B", is_small=True, is_middle=False),
        text(580, 56, "the fused network", is_small=True, is_middle=False),
        row(74, "stream", (["stream"] * 8, ["stream"] * 8), "principal components", ["stream"] * 8),
        row(
            114,
            "heads",
            ([kept, dropped, dropped, kept], [dropped, kept, kept, dropped]),
            "patterns chosen, values fitted anew",
            [kept] * 4,
        ),
        row(
            154,
            "neurons",
            (
                [kept, kept, dropped, kept, dropped, dropped, kept, dropped],
                [dropped, kept, dropped, kept, kept, dropped, dropped, kept],
            ),
            "chosen, readers fitted",
            [kept] * 8,
        ),
    ]
    return document(730, 190, elements)


def pictures() -> dict[str, str]:
    """Returns all pictures, file name → SVG."""
    return {"transformer-stream.svg": stream(), "transformer-refit.svg": refit()}


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    for name, content in pictures().items():
        (folder / name).write_text(content, encoding="utf-8")
