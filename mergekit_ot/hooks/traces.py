"""Traces that are kept between runs: what they depend on besides the module."""

from __future__ import annotations

import types

from mergekit_ot.fusion.options import FusionOptions
from mergekit_ot.fusion.setup import trace_limits
from mergekit_ot.fusion.trace_memory import TraceMemory
from mergekit_ot.graph.capture.description import Undescribed
from mergekit_ot.graph.capture.fingerprint import inputs_digest, own_digest, package_digest, text_digest
from mergekit_ot.hooks.manager import PluginManager
from mergekit_ot.storage.kept import KeptRecords
from mergekit_ot.storage.limits import CHECK_BYTES

_HOOKS = ("mergeot_node_rules", "mergeot_front_ends", "mergeot_symmetries")


def trace_memory(
    traces: KeptRecords, manager: PluginManager, options: FusionOptions, inputs: tuple[object, ...]
) -> TraceMemory | None:
    """Returns where the graphs of a fusion are looked up; None where something that they depend on has no digest.

    Args:
        traces: Where they are kept.
        manager: Whose rules and front ends trace.
        options: With the front end and the limits.
        inputs: At which is traced.
    """
    try:
        parts = [
            own_digest(),
            inputs_digest(inputs),
            options.front_end,
            str(trace_limits(options)),
            str(CHECK_BYTES.value),
        ]
        for hook in _HOOKS:
            for name, plugin, version in manager.implementers(hook):
                parts += [hook, name, version, _code_digest(plugin)]
    except Undescribed:
        return None
    return TraceMemory(traces, text_digest(*parts))


def _code_digest(plugin: object) -> str:
    """Returns the digest of the package of a plugin, which is a module unless it was made in this process."""
    if not isinstance(plugin, types.ModuleType):
        raise Undescribed("a plugin that is no module")
    return package_digest(plugin.__name__.partition(".")[0])
