"""Metric SPECs: code of the user's that scores outputs against targets."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from mergekit_ot.errors import RecipeError
from mergekit_ot.scoring.metrics import Accumulating, Metric
from mergekit_ot.sources.specs import call_with, find_object, parse_spec

_FORMS = "A metric is package.module:name or path/file.py:name, with ?key=value: a function, or a class of metrics."


def resolve_metric(spec: str) -> Metric:
    """Finds the metric that a SPEC names.

    Args:
        spec: A function of outputs and targets that gives a number; or a class, or an object, with ``update`` and
            ``compute``. Its keyword arguments follow as a query.

    Raises:
        RecipeError: There is no such thing, or it is neither.

    Example:
        >>> resolve_metric("torch.nn.functional:l1_loss").name
        'l1_loss'
    """
    parsed = parse_spec(spec)
    if parsed.name is None and not parsed.is_file:
        raise RecipeError(f"'{spec}' names no metric. {_FORMS}")
    found = find_object(parsed, "metric", {}, RecipeError)
    name = parsed.name or spec
    arguments = parsed.arguments
    if isinstance(found, type):
        return Metric(name, lambda: _checked(call_with(found, arguments, f"metric '{spec}'", RecipeError), spec))
    if isinstance(found, Accumulating):
        return Metric(name, lambda: copy.deepcopy(found))
    return Metric(name, lambda: _bound(_checked(found, spec), arguments))


def _bound(function: Callable[..., Any], arguments: dict[str, Any]) -> Callable[..., Any]:
    return functools.partial(function, **arguments) if arguments else function


def _checked(found: Any, spec: str) -> Any:
    if not callable(found) and not isinstance(found, Accumulating):
        raise RecipeError(f"'{spec}' is a {type(found).__name__}, which measures nothing. {_FORMS}")
    return found
