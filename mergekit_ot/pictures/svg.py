"""Pieces of SVG that the pictures of a graph are made of; no external program draws them."""

from __future__ import annotations

from collections.abc import Sequence
from xml.sax.saxutils import escape

from mergekit_ot.text import visible

CHARACTER = 6.6
MARGIN = 24.0
_STYLE = (
    "text{font-family:monospace;font-size:11px;fill:#1a1a1a}text.small{font-size:9px;fill:#666}"
    "rect{fill:#eaf2fb;stroke:#0072B2;stroke-width:1.2}rect.inner{fill:#fff;stroke:#8fbbe0;stroke-width:1}"
    "rect.stream{fill:#cfe3f5;stroke:#0072B2}rect.band{fill:#9cc4e6;stroke:none}"
    "rect.plain{fill:#f4f4f4;stroke:#999}"
    "path{fill:none;stroke:#555;stroke-width:1.2}path.back{stroke:#0072B2;stroke-width:1.2}"
)


def text_width(text: str) -> float:
    """Returns the width of a line of text in pixels."""
    return len(text) * CHARACTER


def box(x: float, y: float, width: float, height: float, kind: str = "") -> str:
    """Returns a rounded box; `kind` is a class of the style sheet."""
    chosen = f' class="{kind}"' if kind else ""
    return f'<rect{chosen} x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="5"/>'


def text(x: float, y: float, content: str, *, is_small: bool = False, is_middle: bool = True) -> str:
    """Returns a line of text, by default centred at `x`."""
    kind = ' class="small"' if is_small else ""
    anchor = ' text-anchor="middle"' if is_middle else ""
    return f'<text{kind} x="{x:.1f}" y="{y:.1f}"{anchor}>{escape(visible(content))}</text>'


def arrow(curve: str, title: str, kind: str = "") -> str:
    """Returns an arrow along a path; its title shows where the pointer rests."""
    chosen = f' class="{kind}"' if kind else ""
    return f'<g><path{chosen} d="{curve}" marker-end="url(#head)"><title>{escape(visible(title))}</title></path></g>'


def document(width: float, height: float, elements: Sequence[str]) -> str:
    """Returns a whole SVG file on white ground."""
    head = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" style="fill:#777;stroke:none"/></marker></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
        f'viewBox="0 0 {width:.0f} {height:.0f}"><style>{_STYLE}</style>{head}'
        f'<rect x="0" y="0" width="100%" height="100%" style="fill:white;stroke:none"/>{"".join(elements)}</svg>\n'
    )
