"""The symmetries that plugins registered, built."""

from __future__ import annotations

from mergekit_ot.errors import PluginError, blaming
from mergekit_ot.graph.symmetry.symmetry import AbstractSymmetry
from mergekit_ot.hooks.entries import Entry
from mergekit_ot.hooks.manager import PluginManager


def build_symmetries(manager: PluginManager) -> tuple[AbstractSymmetry, ...]:
    """Returns every registered symmetry.

    Raises:
        PluginError: One cannot be imported, raises when it is made, or is no symmetry.
    """
    return tuple(map(_built, manager.symmetries.values()))


def _built(entry: Entry) -> AbstractSymmetry:
    kind = entry.load()
    with blaming(kind, f"Symmetry '{entry.name}'"):
        symmetry = kind()
    if not isinstance(symmetry, AbstractSymmetry):
        raise PluginError(
            f"Plugin '{entry.plugin}' registers the symmetry '{entry.name}', which is no subclass of AbstractSymmetry "
            f"but {kind!r:.80}. Reinstall the plugin, or leave it out with MERGEOT_PLUGINS."
        )
    return symmetry


def required_symmetries(manager: PluginManager) -> tuple[AbstractSymmetry, ...]:
    """Returns every registered symmetry, for a proof.

    Raises:
        PluginError: There is none, so that nothing could be proven.
    """
    symmetries = build_symmetries(manager)
    if not symmetries:
        raise PluginError(
            "No plugin registers a symmetry, so no neuron group can be proven. The order of neurons comes with the "
            "plugin of the node rules: name it in MERGEOT_PLUGINS too, or register mergekit_ot.Order (hook "
            "mergeot_symmetries)."
        )
    return symmetries
