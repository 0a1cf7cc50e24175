"""The symmetries that plugins registered, built."""

from __future__ import annotations

from mergekit_ot.errors import PluginError
from mergekit_ot.graph.symmetry.symmetry import AbstractSymmetry
from mergekit_ot.hooks.manager import PluginManager


def build_symmetries(manager: PluginManager) -> tuple[AbstractSymmetry, ...]:
    """Returns every registered symmetry."""
    return tuple(entry.load()() for entry in manager.symmetries.values())


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
