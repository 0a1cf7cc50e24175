"""An alarm for tests of files that nobody trusts: it rings where something in one would run."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from tests.malicious_programs import MODULE

_ALARMS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "pickle.find_class", "ctypes.dlopen")
_heard: list[str] = []
_is_listening = False


def _listen(event: str, arguments: tuple[Any, ...]) -> None:
    if _is_listening and (event in _ALARMS or (event == "import" and arguments[0].startswith(MODULE))):
        _heard.append(f"{event} {arguments}")


sys.addaudithook(_listen)  # it cannot be taken away again


@contextlib.contextmanager
def alarm() -> Iterator[None]:
    """Fails where something is unpickled, started, loaded or imported that no checkpoint needs."""
    global _is_listening
    _heard.clear()
    _is_listening = True
    try:
        yield
    finally:
        _is_listening = False
    assert _heard == []
