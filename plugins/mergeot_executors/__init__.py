"""Executors: what runs the steps of a fusion plan."""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_ot import hookimpl


@hookimpl
def mergeot_executors() -> Mapping[str, str]:
    """Return the serial executor."""
    return {"serial": "mergeot_executors.serial:SerialExecutor"}
