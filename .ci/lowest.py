"""Prints the lowest versions that pyproject.toml allows, as constraints for pip; torch is left to the caller.

The lowest torch is a build of several gigabytes, so that whoever wants it tried has to say so.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["project"]
for requirement in [*project["dependencies"], *project["optional-dependencies"]["demo"]]:
    name, lowest = re.match(r"([\w.-]+)\s*>=\s*([\w.]+)", requirement).groups()
    if name != "torch":
        print(f"{name}=={lowest}")
