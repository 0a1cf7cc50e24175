"""Paths that lead to no file: devices, pipes, sockets, folders, loops; and names that are hard to write."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

from hostile.case import ARCH, Case


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _random(path: Path) -> None:
    path.symlink_to("/dev/urandom")


def _loop(path: Path) -> None:
    path.symlink_to(path)


def _socket(path: Path) -> None:
    # Names of sockets are short.
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def _folder(path: Path) -> None:
    path.mkdir()


def _nothing(path: Path) -> None:
    path.with_name(path.name + "x").touch()


_KINDS: list[tuple[str, Callable[[Path], object], str]] = [
    ("link to /dev/zero", _device, "a device"),
    ("link to /dev/urandom", _random, "a device"),
    ("pipe", os.mkfifo, "a pipe"),
    ("socket", _socket, "a socket"),
    ("link to itself", _loop, ""),
    ("folder", _folder, ""),
    ("nothing", _nothing, "Did you mean"),
]
_COMMANDS = {
    ".pt": ("inspect", "FILE", "--arch", ARCH),
    ".safetensors": ("check", "FILE", "--arch", ARCH),
    ".pt2": ("inspect", "FILE"),
    ".npz": ("eval", "GOOD", "--data", "FILE"),
    ".yaml": ("fuse", "--recipe", "FILE"),
}


def _case(name: str, end: str, make: Callable[[Path], object], *says: str) -> Case:
    return Case(f"{name} as {end}", f"bad{end}", make, says, _COMMANDS[end])


PLACES: list[Case] = [_case(name, end, make, says) for end in _COMMANDS for name, make, says in _KINDS]
