"""Commands, run in this process."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mergekit_ot.cli.app import main


def commands(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Gives a way to run commands; returns what they print on standard error, or their JSON."""

    def ran(*arguments: str, status: int = 0) -> str:
        with pytest.raises(SystemExit) as stopped:
            main(list(arguments))
        printed = capsys.readouterr()
        assert (stopped.value.code or 0) == status, printed.err
        return printed.out if "--json" in arguments else printed.err

    return ran
