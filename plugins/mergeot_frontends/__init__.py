"""Front ends besides `torch.export`: `make-fx` as the last resort, and `symbolic` by `torch.fx.symbolic_trace`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from mergekit_ot import hookimpl

if TYPE_CHECKING:
    from mergekit_ot import AbstractFrontEnd


@hookimpl
def mergeot_front_ends() -> Mapping[str, type[AbstractFrontEnd] | str]:
    """Return the front ends."""
    return {
        "make-fx": "mergeot_frontends.make_fx:MakeFxFrontEnd",
        "symbolic": "mergeot_frontends.symbolic:SymbolicFrontEnd",
    }
