"""Logs every step of a fusion through the logger ``mergeot``; ``MERGEOT_LOG=info`` shows it when commands run."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING

from mergekit_ot import RecipeError, hookimpl, printable
from mergekit_ot.errors import unknown_name

if TYPE_CHECKING:
    import typer

    from mergekit_ot import StepReport

VARIABLE = "MERGEOT_LOG"
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO}

_logger = logging.getLogger("mergeot")


@hookimpl
def mergeot_step_done(report: StepReport) -> None:
    """Logs one line per group at INFO, and what its status advises at DEBUG."""
    if not _logger.isEnabledFor(logging.INFO):
        return
    for group in report.groups:
        cost = "no cost" if group.cost is None else f"cost {group.cost:.6g}"
        _logger.info(
            "sweep %d, step %d of %d: group %s of %d neurons, %s, %s",
            report.sweep + 1,
            report.number + 1,
            report.total,
            group.name,
            group.size,
            cost,
            group.status.name.lower(),
        )
        _logger.debug("group %s: %s", group.name, group.status.value)


@hookimpl
def mergeot_commands(app: typer.Typer) -> None:
    """Adds no command; where ``MERGEOT_LOG`` is set, the log goes to standard error while commands run."""
    show_on_stderr(os.environ.get(VARIABLE, ""))


def show_on_stderr(level: str) -> None:
    """Writes what is logged from `level` on to standard error; an empty level stops it.

    Raises:
        RecipeError: There is no such level.
    """
    if level and level.lower() not in LEVELS:
        raise RecipeError(f"{VARIABLE}: {unknown_name('level', level, LEVELS)}")
    for handler in [handler for handler in _logger.handlers if isinstance(handler, _StderrHandler)]:
        _logger.removeHandler(handler)
        _logger.setLevel(logging.NOTSET)
    if level:
        _logger.addHandler(_StderrHandler())
        _logger.setLevel(LEVELS[level.lower()])


class _StderrHandler(logging.Handler):
    """Writes to standard error as it is when something is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        # On a terminal a progress line may stand there.
        start = "\r\x1b[2K" if sys.stderr.isatty() else ""
        sys.stderr.write(f"{start}mergeot: {printable(self.format(record))}\n")
