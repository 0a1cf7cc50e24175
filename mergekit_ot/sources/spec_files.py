"""Which files a SPEC reads, found by their names: nothing is imported and nothing opened."""

from __future__ import annotations

import sys
from pathlib import Path

from mergekit_ot.sources.specs import parse_spec


def spec_files(spec: str) -> list[Path]:
    """Returns the files that an architecture or data SPEC names: its own, its module's, and those in its arguments.

    Example:
        >>> spec_files("nets.py:mlp?hidden=64"), spec_files("mnist.npz?limit=10")
        ([PosixPath('nets.py')], [PosixPath('mnist.npz')])
    """
    parsed = parse_spec(spec)
    named = [Path(value) for value in parsed.arguments.values() if isinstance(value, str) and _is_file(Path(value))]
    if parsed.name is None or parsed.is_file:
        return [Path(parsed.place), *named]
    return [*_module_files(parsed.place), *named]


def _module_files(module: str) -> list[Path]:
    """Returns the files where Python would look for a module and the packages that it is in, as far as they exist."""
    parts = module.split(".")
    steps = [Path(*parts[:count]) for count in range(1, len(parts) + 1)]
    places = [place for step in steps for place in (step.with_suffix(".py"), step / "__init__.py")]
    roots = dict.fromkeys([Path.cwd(), *map(Path, sys.path)])
    return [root / place for root in roots for place in places if _is_file(root / place)]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False
