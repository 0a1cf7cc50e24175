"""Importing plugins: within a time limit, and whatever one does meanwhile is told by its name."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

from mergekit_ot.errors import PluginError, reason_of, unknown_name

SECONDS_VARIABLE = "MERGEOT_MAX_IMPORT_SECONDS"
_DEFAULT_SECONDS = 120.0

Loaded = TypeVar("Loaded")


class _TooLong(BaseException):
    """The import of a plugin takes too long; no plugin catches it by catching `Exception`."""


@dataclass
class _Interrupts:
    """What the keyboard did while a plugin was imported."""

    is_user: bool = False


def imported(load: Callable[[], Loaded]) -> Loaded:
    """Returns what `load` imports.

    Raises:
        PluginError: It raised something, tried to end the program, or took longer than ``MERGEOT_MAX_IMPORT_SECONDS``.
        KeyboardInterrupt: The user pressed Ctrl-C meanwhile.
    """
    interrupts, seconds = _Interrupts(), most_seconds()
    try:
        with _watched(interrupts, seconds):
            return load()
    except PluginError:
        raise
    except _TooLong:
        raise PluginError(
            f"importing it takes longer than {seconds:g} s (the environment variable {SECONDS_VARIABLE} allows more)"
        ) from None
    except KeyboardInterrupt as error:
        if interrupts.is_user:
            raise
        raise PluginError("it raised KeyboardInterrupt while it was imported") from error
    except (Exception, SystemExit) as error:
        raise PluginError(reason_of(error)) from error


def most_seconds() -> float:
    """Returns how long the import of a plugin may take.

    Raises:
        PluginError: The environment variable holds no number above zero.
    """
    text = os.environ.get(SECONDS_VARIABLE)
    if text is None:
        return _DEFAULT_SECONDS
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise PluginError(f"{SECONDS_VARIABLE} is '{text}': give a number of seconds above zero, such as 300.")


@contextlib.contextmanager
def _watched(interrupts: _Interrupts, seconds: float) -> Iterator[None]:
    """Notes Ctrl-C, and stops the block after a time; only the main thread of a POSIX system can."""
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)

    def interrupted(number: int, frame: FrameType | None) -> None:
        interrupts.is_user = True
        if callable(before):
            before(number, frame)

    def rung(number: int, frame: FrameType | None) -> None:
        raise _TooLong

    is_free = signal.getitimer(signal.ITIMER_REAL)[0] == 0
    alarm = signal.getsignal(signal.SIGALRM)
    try:
        if callable(before):
            signal.signal(signal.SIGINT, interrupted)
        if is_free:
            signal.signal(signal.SIGALRM, rung)
            signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        if is_free:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, alarm)
        if callable(before):
            signal.signal(signal.SIGINT, before)


def attribute_at(place: str) -> Any:
    """Returns what stands at ``package.module:attribute``.

    Raises:
        PluginError: It cannot be imported, or there is no such attribute.
    """
    module, _, attribute = place.partition(":")
    return imported(lambda: functools.reduce(getattr, attribute.split("."), importlib.import_module(module)))


def wanted_points(group: str) -> list[importlib.metadata.EntryPoint]:
    """Returns the entry points of the installed plugins by name, of those in ``MERGEOT_PLUGINS`` where it is set.

    Raises:
        PluginError: ``MERGEOT_PLUGINS`` names a plugin that is not installed.
    """
    points = sorted(importlib.metadata.entry_points(group=group), key=lambda point: point.name)
    chosen = os.environ.get("MERGEOT_PLUGINS")
    if chosen is None:
        return points
    wanted = [name.strip() for name in chosen.split(",") if name.strip()]
    installed = {point.name for point in points}
    for name in wanted:
        if name not in installed:
            raise PluginError(f"MERGEOT_PLUGINS: {unknown_name('plugin', name, installed)}")
    return [point for point in points if point.name in wanted]
