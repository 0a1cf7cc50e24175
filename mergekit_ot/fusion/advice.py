"""What a user should know before the result is used: what this fusion cannot do for this network, and what can."""

from __future__ import annotations

from mergekit_ot.fusion.setup import FusionSetup
from mergekit_ot.graph.ir import ModelGraph
from mergekit_ot.graph.symmetry.rotations import has_streams_or_heads


def advice(setup: FusionSetup, graph: ModelGraph) -> list[str]:
    """Returns sentences about a fusion without a repair whose solver misses what its network has.

    Args:
        setup: The fusion.
        graph: The fused architecture.
    """
    methods = setup.methods
    if methods.repair is not None or methods.solver.max_sweeps == 0:
        return []
    sentences = []
    if _has_statistics(graph):
        sentences.append(
            "The network has BatchNorm, whose running statistics do not fit a fused network. "
            "Give calibration data and a repair: --data SPEC --repair refit, or reset (no labels are used)."
        )
    # 'align' does without every sentence that names a repair.
    is_only_ordered = not methods.uses_rotations and len(setup.networks.sources) > 1
    if is_only_ordered and has_streams_or_heads(graph):
        sentences.append(
            f"The network has residual streams behind norms, or attention heads, whose neurons may be rotated; solver "
            f"'{methods.solver.name}' as it is set only reorders them, and orders alone leave transformers far apart. "
            "Take --solver weight-matching (symmetry=all, its default), which rotates them, or --data SPEC --repair "
            "refit, which fuses them (no labels are used)."
        )
    return sentences


def _has_statistics(graph: ModelGraph) -> bool:
    """Whether a network normalises by statistics that it keeps; vectors of spectral norms are buffers too."""
    # A program calls them so, in whatever way it calls parameters and buffers.
    buffers = tuple(name.replace(".", "_") for name in graph.buffers)
    for name, data in graph.operations.nodes(data=True) if buffers else ():
        operation = str(data.get("operation", ""))
        if "batch_norm" in operation and "no_stats" not in operation:
            return True
        if "instance_norm" in operation and any(each.endswith(buffers) for each in graph.operations.predecessors(name)):
            return True
    return False
