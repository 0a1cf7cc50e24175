"""Draws the pictures of docs/explanation/axis-algebra.md: python docs/examples/axis_algebra_pictures.py [FOLDER]."""

from __future__ import annotations

import sys
from pathlib import Path

from mergekit_ot.graph.axes.algebra import AxisAlgebra
from mergekit_ot.graph.axes.expressions import Replicated
from mergekit_ot.graph.axes.notation import Notation
from mergekit_ot.pictures.axes import AxisRow, axes_svg

FOLDER = Path(__file__).parents[1] / "pictures"


def expressions() -> str:
    """Returns the picture of the five kinds of expressions."""
    algebra = AxisAlgebra()
    heads, dims = algebra.split_product(algebra.atom(12), [3, 4]) or []
    blocks = algebra.atom(8)
    algebra.split_concat(blocks, [3, 5])
    outer, inner = algebra.split_product(algebra.atom(12), [3, 4]) or []
    algebra.cut([outer, inner], 0, [1, 2])
    rows = [
        AxisRow("Atom, free", algebra.atom(6)),
        AxisRow("Atom, pinned", algebra.pinned(6, "model input")),
        AxisRow("Replicated", Replicated(6)),
        AxisRow("Product", algebra.product([heads, dims])),
        AxisRow("Concat", blocks),
        AxisRow("Concat on one axis", outer),
        AxisRow("Case on another", inner),
    ]
    return axes_svg(rows, Notation())


def attention() -> dict[str, str]:
    """Returns the pictures of the worked example by name: what one step after the other makes of two parameters."""
    algebra, notation = AxisAlgebra(), Notation()
    qkv, columns = algebra.atom(24), algebra.atom(8)
    rows = [AxisRow("qkv.weight, axis 0", qkv), AxisRow("out.weight, axis 1", columns)]
    pictures = {"axes-1-linear": axes_svg(rows, notation)}
    batch, tokens = algebra.pinned(2, "model input"), algebra.pinned(5, "model input")
    (_, _, query), (_, _, key), (_, _, value) = algebra.cut([batch, tokens, qkv], 2, [8, 8, 8]) or []
    pictures["axes-2-chunk"] = axes_svg(rows, notation)
    query_heads, query_dims = algebra.split_product(query, [2, 4]) or []
    key_heads, key_dims = algebra.split_product(key, [2, 4]) or []
    value_heads, value_dims = algebra.split_product(value, [2, 4]) or []
    pictures["axes-3-heads"] = axes_svg(rows, notation)
    algebra.unify(query_heads, key_heads)
    algebra.unify(query_dims, key_dims)
    algebra.settle([[query_heads, query_dims], [key_heads, key_dims]])
    pictures["axes-4-scores"] = axes_svg(rows, notation)
    algebra.unify(query_heads, value_heads)
    algebra.settle([[value_heads, value_dims]])
    algebra.unify(columns, algebra.product([value_heads, value_dims]))
    algebra.settle([[columns]])
    pictures["axes-5-out"] = axes_svg(rows, notation)
    return pictures


def pictures() -> dict[str, str]:
    """Returns all pictures, file name → SVG."""
    drawn = {"axes-expressions": expressions(), **attention()}
    return {f"{name}.svg": content for name, content in drawn.items()}


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FOLDER
    for name, content in pictures().items():
        (folder / name).write_text(content, encoding="utf-8")
