"""Why an axis stays in place."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PinReason:
    """Why an axis may not be reordered: a sentence, and the operation, module path and source line behind it."""

    why: str
    operation: str = ""
    module_path: str = ""
    source: str = ""

    def __str__(self) -> str:
        place = f" at '{self.module_path}'" if self.module_path else ""
        operation = f" [{self.operation}{place}]" if self.operation else place
        return f"{self.why}{operation}" + (f" ({self.source})" if self.source else "")
