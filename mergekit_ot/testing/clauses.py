"""How a contract is checked: clause after clause, and the first that does not hold is named with what happened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mergekit_ot.errors import PluginError

# Returns what went wrong, nothing where the clause holds; the docstring is the promise.
Clause = Callable[..., str | None]


def _passed_on(error: Exception) -> str | None:
    return None


def raised_by(culprit: str) -> Callable[[Exception], str]:
    """Returns the sentence for whatever is raised by what is checked.

    Example:
        >>> raised_by("the store")(KeyError("weight"))
        "the store raised KeyError: 'weight'"
    """
    return lambda error: f"{culprit} raised {type(error).__name__}: {error}"


@dataclass(frozen=True)
class Contract:
    """Who promised, and what is said where a promise is broken.

    Attributes:
        subject: What is checked, as the message begins.
        advice: What to do about it, as the message ends.
        error: What is raised where a clause is broken.
        blame: Gives the sentence for an error that a clause meets; None for one that is not the subject's.

    Example:
        >>> def is_positive(number):
        ...     '''It is positive.'''
        ...     return "" if number > 0 else f"it is {number}"
        >>> Contract("The number", "Take another.").check(is_positive, -2)
        Traceback (most recent call last):
        mergekit_ot.errors.PluginError: The number breaks its contract. The clause: It is positive. What happened: it is
        -2. Take another.
    """

    subject: str
    advice: str
    error: type[Exception] = PluginError
    blame: Callable[[Exception], str | None] = _passed_on

    def check(self, clause: Clause, *arguments: Any, where: str = "") -> None:
        """Checks one clause.

        Args:
            clause: The clause.
            *arguments: What it is called with.
            where: Of what the clause is checked, where that is not plain: ``, for an MLP``.

        Raises:
            Exception: The contract's own `error`, where the clause is broken.
        """
        try:
            detail = clause(*arguments)
        except Exception as error:  # what is checked may raise anything
            detail = self.blame(error)
            if detail is None:
                raise
        if detail:
            promise = (clause.__doc__ or "").strip().rstrip(".")
            raise self.error(
                f"{self.subject} breaks its contract. The clause: {promise}. "
                f"What happened{where}: {detail.rstrip('.')}. {self.advice}"
            )
