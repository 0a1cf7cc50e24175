"""How heavily each source counts: model weights, as numbers that sum to one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_ot.errors import RecipeError

# Sums that differ from one by less are one.
_TOLERANCE = 1e-6


def checked_weights(model_weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Returns one weight per source, divided by their sum; zero is a weight like any other.

    Raises:
        RecipeError: The weights are negative, too many or few, or all zero.

    Example:
        >>> checked_weights((100, 300), 2)
        (0.25, 0.75)
    """
    if model_weights is None:
        return tuple(1.0 / count for _ in range(count))
    weights = tuple(float(weight) for weight in model_weights)
    if len(weights) != count:
        raise RecipeError(f"There are {len(weights)} model weights for {count} models. Give one weight per model.")
    total = math.fsum(weights)
    if any(not weight >= 0 for weight in weights) or not 0 < total < math.inf:
        raise RecipeError(
            f"The model weights {list(weights)} must be non-negative and sum to one, not {total:g}. (Weights "
            "that sum to another finite number above zero are divided by it.)"
        )
    return weights if abs(total - 1) <= _TOLERANCE else tuple(weight / total for weight in weights)


def weights_note(model_weights: Sequence[float] | None, used: Sequence[float]) -> tuple[str, ...]:
    """Returns a sentence where model weights were divided by their sum.

    Example:
        >>> weights_note((100, 300), (0.25, 0.75))
        ('The model weights 100, 300 sum to 400 and were divided by it: 0.25, 0.75.',)
    """
    if model_weights is None or abs(math.fsum(model_weights) - 1) <= _TOLERANCE:
        return ()
    given, shown = (", ".join(f"{weight:g}" for weight in weights) for weights in (model_weights, used))
    return (f"The model weights {given} sum to {math.fsum(model_weights):g} and were divided by it: {shown}.",)
