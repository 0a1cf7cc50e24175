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
from typing import Any, Protocol, runtime_checkable

import pluggy

from mergekit_ot.errors import (
    ArchitectureError,
    DataError,
    MergeotError,
    PluginError,
    RecipeError,
    unknown_name,
)
from mergekit_ot.hooks import hookspecs

GROUP = hookspecs.PROJECT
PREFIX = "mergeot_"

# What can be looked up by name: the hook that registers it, and the error for a name that nobody registered.
_KINDS: dict[str, tuple[str, type[MergeotError]]] = {
    "solver": ("mergeot_solvers", RecipeError),
    "rule": ("mergeot_node_rules", PluginError),
    "front end": ("mergeot_front_ends", ArchitectureError),
    "measure": ("mergeot_node_measures", RecipeError),
    "architecture": ("mergeot_architectures", ArchitectureError),
    "dataset": ("mergeot_datasets", DataError),
    "executor": ("mergeot_executors", RecipeError),
    "repair": ("mergeot_repairs", RecipeError),
    "symmetry": ("mergeot_symmetries", PluginError),
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
        except Exception as error:
            raise PluginError(
                f"Plugin '{self.plugin}' registers '{self.name}' as '{self.target}', which cannot be imported: "
                f"{_reason(error)}. Reinstall the plugin, or leave it out with MERGEOT_PLUGINS."
            ) from error


@runtime_checkable
class _Named(Protocol):
    __name__: str


@dataclass(frozen=True)
class PluginRow:
    """One line of ``mergeot plugins``."""

    name: str
    version: str
    distribution: str
    hooks: tuple[str, ...]
    registered: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


class _Registered:
    """An attribute of the manager: the table of everything of one kind."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __get__(self, manager: PluginManager, owner: type[PluginManager]) -> Mapping[str, Entry]:
        return manager.table(self.kind)


class PluginManager:
    """Holds plugins and the tables of what they register.

    Args:
        plugins: Plugin objects or modules; each is named by its ``__name__`` or its class.

    Attributes:
        broken: Plugin → why it, or one of its hooks, is left out.

    Raises:
        PluginError: Two plugins have one name, or one implements a hook with arguments that the hook does not have.

    Example:
        >>> from types import SimpleNamespace
        >>> mine = SimpleNamespace(__name__="mine", mergeot_solvers=hookspecs.hookimpl(lambda: {"mine": "home:Solver"}))
        >>> PluginManager([mine]).solvers
        {'mine': Entry(name='mine', plugin='mine', target='home:Solver')}
    """

    solvers = _Registered("solver")
    """Registered solvers."""
    node_rules = _Registered("rule")
    """Registered node rules."""
    front_ends = _Registered("front end")
    """Registered front ends, besides ``export``."""
    node_measures = _Registered("measure")
    """Registered node measures."""
    architectures = _Registered("architecture")
    """Registered architectures."""
    datasets = _Registered("dataset")
    """Registered data sets."""
    executors = _Registered("executor")
    """Registered executors."""
    repairs = _Registered("repair")
    """Registered repairs."""
    symmetries = _Registered("symmetry")
    """Registered symmetries of neuron groups."""

    def __init__(self, plugins: Iterable[object] = ()) -> None:
        self._pluggy = pluggy.PluginManager(GROUP)
        self._pluggy.add_hookspecs(hookspecs)
        self.broken: dict[str, str] = {}
        self._tables: dict[str, Mapping[str, Entry]] = {}
        self._distributions: dict[str, tuple[str, str]] = {}
        for plugin in plugins:
            self.register(plugin, plugin.__name__ if isinstance(plugin, _Named) else type(plugin).__name__)

    @classmethod
    def load(cls) -> PluginManager:
        """Returns a manager with the installed plugins (those in ``MERGEOT_PLUGINS``, where it is set)."""
        manager = cls()
        for point in _wanted_points():
            manager._load_entry_point(point)
        return manager

    def _load_entry_point(self, point: importlib.metadata.EntryPoint) -> None:
        distribution, version = (point.dist.name, point.dist.version) if point.dist is not None else ("unknown", "")
        if point.name in self._distributions:
            raise PluginError(
                f"Distributions '{self._distributions[point.name][0]}' and '{distribution}' both have a plugin called "
                f"'{point.name}'. Uninstall one of them."
            )
        self._distributions[point.name] = (distribution, version)
        try:
            self.register(point.load(), point.name)
        except Exception as error:  # importing a plugin may raise anything, and must not stop the host
            reason = f"{error}" if isinstance(error, PluginError) else _reason(error)
            self._leave_out(
                point.name,
                reason,
                f"Plugin '{point.name}' of distribution '{distribution}' cannot be loaded",
                f"Reinstall or remove '{distribution}'.",
            )

    def _leave_out(self, plugin: str, reason: str, what: str, advice: str) -> None:
        self.broken[plugin] = reason
        warnings.warn(f"{what} and is left out: {reason.rstrip('.')}. {advice}", stacklevel=2)

    def register(self, plugin: object, name: str) -> None:
        """Adds one plugin under `name`; an implementation of a hook that does not exist is left out with a warning.

        Raises:
            PluginError: Another plugin has that name, or a hook is implemented with arguments that it does not have.
        """
        if self._pluggy.has_plugin(name):
            raise PluginError(f"Two plugins are called '{name}'. Rename one, or choose with MERGEOT_PLUGINS.")
        known = [hook for hook in vars(hookspecs) if hook.startswith(PREFIX)]
        for attribute, _ in inspect.getmembers(plugin, callable):
            options = self._pluggy.parse_hookimpl_opts(plugin, attribute)
            implemented = (options or {}).get("specname") or attribute
            if options is not None and implemented not in known:
                sentence = unknown_name("hook", implemented, known)
                warnings.warn(f"Plugin '{name}': {sentence} The function is left out.", stacklevel=2)
        try:
            self._pluggy.register(plugin, name)
        except pluggy.PluginValidationError as error:
            # Older pluggy (1.5) keeps the name of a plugin that it refused.
            self._pluggy.unregister(name=name)
            raise PluginError(f"Plugin '{name}' implements a hook wrongly: {error}") from error
        self._tables.clear()

    @property
    def hook(self) -> Any:
        """The hooks, to be called with keyword arguments."""
        return self._pluggy.hook

    def table(self, kind: str) -> Mapping[str, Entry]:
        """Returns name → entry of everything of one kind: solver, rule, measure and so on.

        Raises:
            PluginError: Two plugins register one name.
        """
        if kind not in self._tables:
            entries: dict[str, Entry] = {}
            for implementation in getattr(self._pluggy.hook, _KINDS[kind][0]).get_hookimpls():
                for name, target in self._registered(implementation).items():
                    if name in entries:
                        raise PluginError(
                            f"Plugins '{entries[name].plugin}' and '{implementation.plugin_name}' both register "
                            f"{kind} '{name}'. Choose one with MERGEOT_PLUGINS."
                        )
                    entries[name] = Entry(name, implementation.plugin_name, target)
            self._tables[kind] = dict(sorted(entries.items()))
        return self._tables[kind]

    def _registered(self, implementation: pluggy.HookImpl) -> Mapping[str, Any]:
        plugin, hook = implementation.plugin_name, implementation.function.__name__
        advice = "Reinstall the plugin, or leave it out with MERGEOT_PLUGINS."
        try:
            found = implementation.function()
        except Exception as error:  # a plugin may raise anything, and must not stop the host
            self._leave_out(plugin, f"{hook} raised {_reason(error)}", f"Plugin '{plugin}' has a broken hook", advice)
            return {}
        if not isinstance(found, Mapping):
            reason = f"{hook} returned a {type(found).__name__}, not a mapping of names"
            self._leave_out(plugin, reason, f"Plugin '{plugin}' has a broken hook", advice)
            return {}
        return found

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
            callers = self._pluggy.get_hookcallers(plugin) or ()
            hooks = tuple(sorted(caller.name for caller in callers if caller.name in vars(hookspecs)))
            registered = {
                kind: tuple(entry.name for entry in self.table(kind).values() if entry.plugin == name)
                for kind, (hook, _) in _KINDS.items()
                if hook in hooks
            }
            distribution, version = self._distributions.get(name, ("", ""))
            rows.append(PluginRow(name, version, distribution, hooks, registered))
        return sorted(rows, key=lambda row: row.name)


def _wanted_points() -> list[importlib.metadata.EntryPoint]:
    """Returns the entry points of the installed plugins by name, of those in ``MERGEOT_PLUGINS`` where it is set."""
    points = sorted(importlib.metadata.entry_points(group=GROUP), key=lambda point: point.name)
    chosen = os.environ.get("MERGEOT_PLUGINS")
    if chosen is None:
        return points
    wanted = [name.strip() for name in chosen.split(",") if name.strip()]
    installed = {point.name for point in points}
    for name in wanted:
        if name not in installed:
            raise PluginError(f"MERGEOT_PLUGINS: {unknown_name('plugin', name, installed)}")
    return [point for point in points if point.name in wanted]


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@functools.cache
def default_manager() -> PluginManager:
    """Returns the manager of the installed plugins, loaded once per process.

    Example:
        >>> default_manager() is default_manager()
        True
        >>> {"weights", "activations"} <= set(default_manager().node_measures)
        True
    """
    return PluginManager.load()
