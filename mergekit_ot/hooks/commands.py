"""The commands of a command line before a plugin adds its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import typer


class CommandTable:
    """What an app holds now, so that what a plugin does to it can be undone.

    Args:
        app: The command line.
    """

    def __init__(self, app: typer.Typer) -> None:
        self._app, self._callback = app, app.registered_callback
        self._commands, self._groups = list(app.registered_commands), list(app.registered_groups)

    def taken(self) -> str | None:
        """Returns a name that what was added since takes from another command; None where it takes none."""
        app = self._app
        if app.registered_callback is not self._callback or not self._is_whole():
            return "mergeot"
        before = _names(self._commands, self._groups)
        added = _names(app.registered_commands[len(self._commands) :], app.registered_groups[len(self._groups) :])
        twice = [name for place, name in enumerate(added) if name in before or name in added[:place]]
        return next(iter(twice), None)

    def restore(self) -> None:
        """Takes away everything that was added since."""
        self._app.registered_callback = self._callback
        self._app.registered_commands[:] = self._commands
        self._app.registered_groups[:] = self._groups

    def _is_whole(self) -> bool:
        """Whether everything that was there is there, in its place."""
        app = self._app
        pairs = [*zip(self._commands, app.registered_commands, strict=False)]
        groups = [*zip(self._groups, app.registered_groups, strict=False)]
        is_long = len(pairs) == len(self._commands) and len(groups) == len(self._groups)
        return is_long and all(old is new for old, new in [*pairs, *groups])


def _names(commands: list, groups: list) -> list[str]:
    from typer.main import get_command_name

    named = [command.name or get_command_name(command.callback.__name__) for command in commands]
    return [*named, *(group.name or group.typer_instance.info.name for group in groups)]
