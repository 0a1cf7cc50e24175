"""The plugin manager: finds plugins, blames them by name, and builds the tables of what they register.

It is an object, made by whoever needs one. Listing plugins and names imports no plugin's heavy modules: a thing may
be registered as an import string, which is resolved when the thing is first used.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import inspect
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pluggy

from mergekit_ot import hookspecs
from mergekit_ot.errors import (
    ArchitectureError,
    DataError,
    MergeotError,
    PluginError,
    RecipeError,
    unknown_name,
)

GROUP = hookspecs.PROJECT
PREFIX = "mergeot_"

# What can be looked up by name: the hook that registers it, and the error for a name that nobody registered.
_KINDS: dict[str, tuple[str, type[MergeotError]]] = {
    "solver": ("mergeot_solvers", RecipeError),
    "rule": ("mergeot_node_rules", PluginError),
    "measure": ("mergeot_node_measures", RecipeError),
    "architecture": ("mergeot_architectures", ArchitectureError),
    "dataset": ("mergeot_datasets", DataError),
    "executor": ("mergeot_executors", RecipeError),
    "repair": ("mergeot_repairs", RecipeError),
}


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
        module, _, attribute = self.target.partition(":")
        try:
            return functools.reduce(getattr, attribute.split("."), importlib.import_module(module))
        except (ImportError, AttributeError) as error:
            raise PluginError(
                f"Plugin '{self.plugin}' registers '{self.name}' as '{self.target}', which cannot be imported: {error}. "
                "Reinstall the plugin, or leave it out with MERGEOT_PLUGINS."
            ) from error


@dataclass(frozen=True)
class PluginRow:
    """One line of ``mergeot plugins``."""

    name: str
    version: str
    distribution: str
    hooks: tuple[str, ...]
    registered: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class PluginManager:
    """Holds plugins and the tables of what they register.

    Args:
        plugins: Plugin objects or modules; each is named by its ``__name__`` or its class.

    Attributes:
        broken: Entry point → why it could not be loaded.

    Raises:
        PluginError: Two plugins have one name.
    """

    def __init__(self, plugins: Iterable[object] = ()) -> None:
        self._pluggy = pluggy.PluginManager(GROUP)
        self._pluggy.add_hookspecs(hookspecs)
        self.broken: dict[str, str] = {}
        self._distributions: dict[str, tuple[str, str]] = {}
        for plugin in plugins:
            self.register(plugin, getattr(plugin, "__name__", type(plugin).__name__))

    @classmethod
    def load(cls) -> PluginManager:
        """Returns a manager with the installed plugins (those in ``MERGEOT_PLUGINS``, where it is set)."""
        manager = cls()
        chosen = os.environ.get("MERGEOT_PLUGINS")
        wanted = None if chosen is None else [name.strip() for name in chosen.split(",") if name.strip()]
        points = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name)
        for name in wanted or ():
            if name not in {point.name for point in points}:
                raise PluginError(f"MERGEOT_PLUGINS: {unknown_name('plugin', name, {p.name for p in points})}")
        for point in points:
            if wanted is None or point.name in wanted:
                manager._load_entry_point(point)
        return manager

    def _load_entry_point(self, point: importlib.metadata.EntryPoint) -> None:
        distribution = point.dist.name if point.dist is not None else "unknown"
        try:
            plugin = point.load()
        except Exception as error:
            self.broken[point.name] = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"Plugin '{point.name}' of distribution '{distribution}' cannot be loaded and is left out: "
                f"{self.broken[point.name]}. Reinstall or remove '{distribution}'.",
                stacklevel=2,
            )
            return
        self._distributions[point.name] = (distribution, point.dist.version if point.dist is not None else "")
        self.register(plugin, point.name)

    def register(self, plugin: object, name: str) -> None:
        """Adds one plugin under `name`.

        Raises:
            PluginError: Another plugin has that name.
        """
        if self._pluggy.has_plugin(name):
            raise PluginError(f"Two plugins are called '{name}'. Rename one, or choose with MERGEOT_PLUGINS.")
        known = {hook for hook in vars(hookspecs) if hook.startswith(PREFIX)}
        for attribute, function in inspect.getmembers(plugin, callable):
            if attribute.startswith(PREFIX) and attribute not in known and hasattr(function, f"{GROUP}_impl"):
                warnings.warn(
                    f"Plugin '{name}': {unknown_name('hook', attribute, known)} It is left out.", stacklevel=2
                )
        self._pluggy.register(plugin, name)

    @property
    def hook(self) -> Any:
        """The hooks, to be called with keyword arguments."""
        return self._pluggy.hook

    @cached_property
    def _tables(self) -> dict[str, Mapping[str, Entry]]:
        return {}

    def table(self, kind: str) -> Mapping[str, Entry]:
        """Returns name → entry of everything of one kind: solver, rule, measure, architecture, dataset …

        Raises:
            PluginError: Two plugins register one name.
        """
        if kind not in self._tables:
            hook, _ = _KINDS[kind]
            entries: dict[str, Entry] = {}
            for implementation in getattr(self._pluggy.hook, hook).get_hookimpls():
                for name, target in implementation.function().items():
                    if name in entries:
                        raise PluginError(
                            f"Plugins '{entries[name].plugin}' and '{implementation.plugin_name}' both register "
                            f"{kind} '{name}'. Choose one with MERGEOT_PLUGINS."
                        )
                    entries[name] = Entry(name, implementation.plugin_name, target)
            self._tables[kind] = dict(sorted(entries.items()))
        return self._tables[kind]

    @property
    def solvers(self) -> Mapping[str, Entry]:
        """Registered solvers."""
        return self.table("solver")

    @property
    def node_rules(self) -> Mapping[str, Entry]:
        """Registered node rules."""
        return self.table("rule")

    @property
    def node_measures(self) -> Mapping[str, Entry]:
        """Registered node measures."""
        return self.table("measure")

    @property
    def architectures(self) -> Mapping[str, Entry]:
        """Registered architectures."""
        return self.table("architecture")

    @property
    def datasets(self) -> Mapping[str, Entry]:
        """Registered data sets."""
        return self.table("dataset")

    @property
    def executors(self) -> Mapping[str, Entry]:
        """Registered executors."""
        return self.table("executor")

    @property
    def repairs(self) -> Mapping[str, Entry]:
        """Registered repairs."""
        return self.table("repair")

    def get(self, kind: str, name: str) -> Any:
        """Returns what is registered as `name`.

        Raises:
            MergeotError: Nothing is (of the kind's own class), with the nearest name and all names.
        """
        table = self.table(kind)
        if name not in table:
            raise _KINDS[kind][1](unknown_name(kind, name, table))
        return table[name].load()

    def describe(self) -> list[PluginRow]:
        """Returns one row per plugin, without importing what they register."""
        rows = []
        for name, plugin in self._pluggy.list_name_plugin():
            if plugin is None:
                continue
            hooks = tuple(sorted(caller.name for caller in self._pluggy.get_hookcallers(plugin) or ()))
            registered = {
                kind: tuple(entry.name for entry in self.table(kind).values() if entry.plugin == name)
                for kind, (hook, _) in _KINDS.items()
                if hook in hooks
            }
            distribution, version = self._distributions.get(name, ("", ""))
            rows.append(PluginRow(name, version, distribution, hooks, registered))
        return sorted(rows, key=lambda row: row.name)


@functools.cache
def default_manager() -> PluginManager:
    """Returns the manager of the installed plugins, loaded once per process."""
    return PluginManager.load()


