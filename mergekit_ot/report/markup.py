"""HTML and SVG from Python, in which text is escaped unless it is markup already."""

from __future__ import annotations

import html

from mergekit_ot.text import visible

_VOID = frozenset({"img", "link", "meta", "br"})


class Markup(str):
    """Finished markup, as opposed to text that has to be escaped."""

    __slots__ = ()


def escape(value: object) -> Markup:
    """Returns a value as markup; of names that are no valid text, a replacement character and escapes are shown."""
    if isinstance(value, Markup):
        return value
    readable = str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return Markup(html.escape(visible(readable), quote=True))


def join(*children: object) -> Markup:
    """Returns text, which is escaped, and markup after each other; None is left out."""
    return Markup("".join(escape(child) for child in children if child is not None))


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """Returns an element.

    Args:
        name: Of the element.
        children: Text, which is escaped, or markup; None is left out.
        attributes: None and False are left out, True stands alone. An underscore stands for a hyphen, one at the end
            is dropped (``class_``).
    """
    shown = ""
    for key, value in attributes.items():
        if value is not None and value is not False:
            shown += f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{escape(value)}"')
    if name in _VOID:
        return Markup(f"<{name}{shown}>")
    return Markup(f"<{name}{shown}>{join(*children)}</{name}>")
