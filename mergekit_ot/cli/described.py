"""What a page of the documentation takes from the code: names after ``:::`` become signatures and docstrings.

The site does the same with mkdocstrings; a terminal gets it here.
"""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Callable

_WIDTH = 100
_NEXT_PARAMETER = re.compile(r", (?=\*{0,2}\w+(?:: | = |=)|\*, )")
_NAMED = re.compile(r"^::: ([\w.]+)\n(?:    .*\n)*", re.MULTILINE)


def with_descriptions(text: str) -> str:
    r"""Returns the text of a page with every line ``::: package.name`` replaced by what the code says of that name.

    Raises:
        AttributeError: The package has no such name.
        ImportError: There is no such package.

    Example:
        >>> print(with_descriptions("::: mergekit_ot.SolverError\n").splitlines()[0])
        ### `SolverError`
    """
    return _NAMED.sub(lambda found: described(found[1]), text)


def described(path: str) -> str:
    """Returns a heading, the signature and the docstring of what stands under a dotted path, as Markdown.

    Raises:
        AttributeError: The package has no such name.
        ImportError: There is no such package.
    """
    thing = pkgutil.resolve_name(path)
    if inspect.ismodule(thing):
        own = [name for name, value in vars(thing).items() if inspect.isfunction(value) and value.__module__ == path]
        return "\n".join(described(f"{path}.{name}") for name in own if not name.startswith("_"))
    name = path.rpartition(".")[2]
    if not (inspect.isclass(thing) or inspect.isroutine(thing)):
        return f"### `{name}`\n\n`{thing!r}`\n"
    members = [f"#### `{member}`\n\n{_body(member, value)}" for member, value in _methods(thing)]
    return "\n".join([f"### `{name}`\n\n{_body(name, thing)}", *members])


def _methods(thing: object) -> list[tuple[str, object]]:
    """Returns the documented public methods and properties that a class itself has."""
    own = vars(thing).items() if inspect.isclass(thing) else ()
    plain = [(name, value.__func__ if isinstance(value, classmethod | staticmethod) else value) for name, value in own]
    return [
        (name, value)
        for name, value in plain
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)) and value.__doc__
    ]


def _body(name: str, thing: object) -> str:
    said = inspect.getdoc(thing) or ""
    return f"```python\n{name}{_signature(thing)}\n```\n\n{said}\n" if callable(thing) else f"{said}\n"


def _signature(thing: Callable[..., object]) -> str:
    try:
        signature = inspect.signature(thing)
    except ValueError:  # written in C
        return ""
    parameters = [
        parameter.replace(annotation=_as_written(parameter.annotation)) for parameter in signature.parameters.values()
    ]
    written = str(signature.replace(parameters=parameters, return_annotation=_as_written(signature.return_annotation)))
    return written if len(written) <= _WIDTH else _NEXT_PARAMETER.sub(",\n    ", written)


class _Unquoted(str):
    """An annotation that is shown as it stands in the source."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _as_written(annotation: object) -> object:
    return _Unquoted(annotation) if isinstance(annotation, str) else annotation
