"""The front end `symbolic`: Python is traced away by `torch.fx.symbolic_trace` first, module by module."""

from __future__ import annotations

from torch import fx, nn

from mergekit_ot import AbstractFrontEnd, CapturedProgram, ExportFrontEnd, TraceBudget


class SymbolicFrontEnd(AbstractFrontEnd):
    """Traces calls of modules and functions symbolically, then lowers the result to aten operations.

    It sees no shapes, so a forward that branches on one is refused; what it accepts holds at every input shape.
    """

    is_fallback = False

    def capture(self, model: nn.Module, inputs: tuple[object, ...], budget: TraceBudget) -> CapturedProgram:
        """Returns the captured program of the symbolically traced module."""
        with budget.watching():
            traced = fx.symbolic_trace(model)
        return ExportFrontEnd().capture(traced.eval(), inputs, budget)
