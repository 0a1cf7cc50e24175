"""What is registered: things by name, and plugins by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mergekit_ot.errors import PluginError
from mergekit_ot.hooks.loading import attribute_at


@dataclass(frozen=True)
class Entry:
    """A registered thing: its name, the plugin it comes from, and the thing or its import string."""

    name: str
    plugin: str
    target: Any

    def load(self) -> Any:
        """Returns the thing itself.

        Raises:
            PluginError: The import string leads nowhere.
        """
        if not isinstance(self.target, str):
            return self.target
        try:
            return attribute_at(self.target)
        except PluginError as error:
            raise PluginError(
                f"Plugin '{self.plugin}' registers '{self.name}' as '{self.target}', which cannot be imported: "
                f"{error}. Reinstall the plugin, or leave it out with MERGEOT_PLUGINS."
            ) from error


@dataclass(frozen=True)
class PluginRow:
    """One line of ``mergeot plugins``."""

    name: str
    version: str
    distribution: str
    hooks: tuple[str, ...]
    registered: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
