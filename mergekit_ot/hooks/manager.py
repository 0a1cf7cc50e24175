"""The plugin manager: finds plugins, blames them by name, and builds the tables of what they register.

It is an object, made by whoever needs one. Listing plugins and names imports no plugin's heavy modules: a thing may
be registered as an import string, which is resolved when the thing is first used.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import pluggy

from mergekit_ot.errors import (
    ArchitectureError,
    DataError,
    MergeotError,
    PluginError,
    RecipeError,
    blaming,
    reason_of,
    unknown_name,
)
from mergekit_ot.hooks import hookspecs
from mergekit_ot.hooks.commands import CommandTable
from mergekit_ot.hooks.entries import Entry, PluginRow
from mergekit_ot.hooks.loading import imported, wanted_points

if TYPE_CHECKING:
    import typer

GROUP = hookspecs.PROJECT
PREFIX = "mergeot_"

# What can be looked up by name: the hook that registers it, and the error for a name that nobody registered.
_KINDS: dict[str, tuple[str, type[MergeotError]]] = {
    "solver": ("mergeot_solvers", RecipeError),
    "rule": ("mergeot_node_rules", PluginError),
    "front end": ("mergeot_front_ends", ArchitectureError),
    "measure": ("mergeot_node_measures", RecipeError),
    "architecture": ("mergeot_architectures", ArchitectureError),
    "library": ("mergeot_architecture_libraries", ArchitectureError),
    "guess": ("mergeot_guesses", ArchitectureError),
    "dataset": ("mergeot_datasets", DataError),
    "executor": ("mergeot_executors", RecipeError),
    "repair": ("mergeot_repairs", RecipeError),
    "symmetry": ("mergeot_symmetries", PluginError),
}


@runtime_checkable
class _Named(Protocol):
    __name__: str


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
    libraries = _Registered("library")
    """Registered libraries of architectures, by prefix."""
    guesses = _Registered("guess")
    """Registered guesses of architectures, by the name that confirms them."""
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
        for point in wanted_points(GROUP):
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
            self.register(imported(point.load), point.name)
        except PluginError as error:  # a plugin must not stop the host
            self._leave_out(
                point.name,
                f"{error}",
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

    def implementers(self, hook: str) -> list[tuple[str, object, str]]:
        """Returns the plugins that implement a hook: name, plugin, and version of its distribution."""
        found = getattr(self._pluggy.hook, hook).get_hookimpls()
        names = ((each.plugin_name, each.plugin) for each in found)
        return [(name, plugin, " ".join(self._distributions.get(name, ()))) for name, plugin in names]

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
        try:
            found = implementation.function()
        except (Exception, SystemExit) as error:  # a plugin may raise anything, and must not stop the host
            return self._without_hook(plugin, f"{hook} raised {reason_of(error)}")
        if not isinstance(found, Mapping):
            return self._without_hook(plugin, f"{hook} returned a {type(found).__name__}, not a mapping of names")
        odd = next((name for name in found if not isinstance(name, str)), None)
        if odd is not None:
            return self._without_hook(plugin, f"{hook} returned the name {odd!r}, which is no text")
        return found

    def _without_hook(self, plugin: str, reason: str) -> Mapping[str, Any]:
        """Leaves out a hook of a plugin; all its other hooks stay."""
        distribution = self._distributions.get(plugin, ("", ""))[0]
        whose = f" of distribution '{distribution}'" if distribution else ""
        advice = "Reinstall the plugin, or leave it out with MERGEOT_PLUGINS."
        self._leave_out(plugin, reason, f"Plugin '{plugin}'{whose} has a broken hook", advice)
        return {}

    def calls(self, hook: str) -> list[Callable[..., Any]]:
        """Returns the implementations of a hook, the last registered first; what one raises is told by its plugin.

        Example:
            >>> from types import SimpleNamespace
            >>> broken = SimpleNamespace(__name__="mine", mergeot_step_done=hookspecs.hookimpl(lambda report: 1 / 0))
            >>> (call,) = PluginManager([broken]).calls("mergeot_step_done")
            >>> call(report=None)
            Traceback (most recent call last):
            ...
            mergekit_ot.errors.PluginError: mergeot_step_done of plugin 'mine' (of ...) raised ZeroDivisionError: ...
        """
        found = getattr(self._pluggy.hook, hook).get_hookimpls()
        return [functools.partial(_called, hook, implementation) for implementation in reversed(found)]

    def observe_step(self, report: object) -> None:
        """Tells every observer that a step is done; one that raises is told once, and never stops the fusion."""
        for implementation in self._pluggy.hook.mergeot_step_done.get_hookimpls():
            if implementation.plugin_name in self.broken:
                continue
            try:
                _called("mergeot_step_done", implementation, report=report)
            except PluginError as error:
                reason = f"mergeot_step_done raised {reason_of(error.__cause__ or error)}"
                self._without_hook(implementation.plugin_name, reason)

    def add_commands(self, app: typer.Typer) -> None:
        """Lets every plugin add its commands; one that raises or takes a taken name loses all of its own."""
        for implementation in self._pluggy.hook.mergeot_commands.get_hookimpls():
            kept = CommandTable(app)
            try:
                _called("mergeot_commands", implementation, app=app)
                taken = kept.taken()
                reason = f"its command '{taken}' is taken" if taken else ""
            except PluginError as error:
                reason = f"mergeot_commands raised {reason_of(error.__cause__ or error)}"
            if reason:
                kept.restore()
                self._without_hook(implementation.plugin_name, reason)

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


def _called(hook: str, implementation: pluggy.HookImpl, /, **arguments: object) -> Any:
    """Returns what an implementation of a hook returns; it may take fewer arguments than the hook has."""
    with blaming(implementation.function, f"{hook} of plugin '{implementation.plugin_name}'"):
        return implementation.function(**{name: arguments[name] for name in implementation.argnames})


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
