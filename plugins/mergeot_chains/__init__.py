"""Plain chains of layers, understood from the names and shapes of a file alone."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ot import hookimpl


@hookimpl
def mergeot_guesses() -> Mapping[str, str]:
    """Returns the guess of this package by the name that confirms it: ``--arch chain``."""
    return {"chain": "mergeot_chains.chain:chain"}
