"""The plugin manager on plain plugin objects: a broken hook costs its plugin only, and the plugin is named."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from mergekit_ot import hookimpl
from mergekit_ot.errors import DataError, PluginError
from mergekit_ot.hooks.manager import PluginManager


def _raise() -> dict[str, str]:
    raise OSError("library is missing")


def _plugin(name: str, **hooks: object) -> SimpleNamespace:
    return SimpleNamespace(__name__=name, **hooks)


GOOD = _plugin("good", mergeot_solvers=hookimpl(lambda: {"good": "mergekit_ot.errors:SolverError"}))


def test_hook_that_raises_leaves_the_others():
    manager = PluginManager([_plugin("bad", mergeot_solvers=hookimpl(_raise)), GOOD])
    with pytest.warns(UserWarning, match=r"'bad'.*OSError: library is missing"):
        assert set(manager.solvers) == {"good"}
    assert "library is missing" in manager.broken["bad"]


def test_hook_that_returns_no_mapping_leaves_the_others():
    manager = PluginManager([_plugin("bad", mergeot_solvers=hookimpl(lambda: ["mine"])), GOOD])
    with pytest.warns(UserWarning, match=r"'bad'.*returned a list, not a mapping"):
        assert set(manager.solvers) == {"good"}


def test_hook_with_arguments_that_it_does_not_have_is_refused_and_not_kept():
    manager = PluginManager([GOOD])
    with pytest.raises(PluginError, match="'bad' implements a hook wrongly"):
        manager.register(_plugin("bad", mergeot_solvers=hookimpl(lambda registrar: {})), "bad")
    assert [row.name for row in manager.describe()] == ["good"]
    assert set(manager.solvers) == {"good"}


def test_implementation_under_another_function_name_is_no_misspelling(recwarn):
    plugin = _plugin("other", anything=hookimpl(lambda: {"mine": "home:Solver"}, specname="mergeot_solvers"))
    assert set(PluginManager([plugin]).solvers) == {"mine"}
    assert not recwarn.list


def test_plugin_registered_later_is_seen():
    manager = PluginManager()
    assert not manager.solvers
    manager.register(GOOD, "good")
    assert set(manager.solvers) == {"good"}


def test_names_are_loaded_on_first_use_only():
    manager = PluginManager([_plugin("lazy", mergeot_datasets=hookimpl(lambda: {"gone": "no_such_module:data"}))])
    assert manager.describe()[0].registered == {"dataset": ("gone",)}
    with pytest.raises(PluginError, match="'lazy' registers 'gone'"):
        manager.get("dataset", "gone")
    with pytest.raises(DataError, match="Did you mean 'gone'"):
        manager.get("dataset", "gon")
