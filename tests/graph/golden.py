"""The golden file: every free group that is found in every test architecture. Run this file to write it anew."""

from __future__ import annotations

import sys
from pathlib import Path

FILE = Path(__file__).with_name("golden_groups.txt")
_HEAD = """\
Free neuron groups of the test architectures, as the checks of tests/graph/test_golden.py must find them.
A line per architecture: set, name, groups, independent orders, groups certified. Below it a line per group: its key,
its size, independent orders where it is a family, places in which it stands.
Written by: python tests/graph/golden.py [SET …]; read the difference before you commit it.
"""


def entry(which: str, name: str, report) -> str:
    """Returns the text of one architecture."""
    lines = [f"{which} {name}: {report.groups} groups, {report.families} orders, {report.certified} certified"]
    for key, group in report.graph.free_groups.items():
        orders = report.graph.family_size(key)
        family = f" x {orders}" if group.context else ""
        lines.append(f"    {key}  {group.size}{family}  in {len(group.members)}")
    return "\n".join(lines) + "\n"


def read() -> dict[tuple[str, str], str]:
    """Returns (set, name) → text."""
    found: dict[tuple[str, str], str] = {}
    current: tuple[str, str] | None = None
    for line in FILE.read_text(encoding="utf-8").splitlines(keepends=True) if FILE.exists() else []:
        words = line.split(":")[0].split()
        if line.strip() and not line.startswith(" ") and line.rstrip().endswith("certified"):
            current = words[0], words[1]
            found[current] = line
        elif current is not None and line.startswith("    "):
            found[current] += line
    return found


def write(sets: list[str]) -> None:
    """Checks the architectures of `sets` and writes their entries; the others stay as they are."""
    from architectures import names, samples

    from mergekit_ot import check_model

    found = {key: text for key, text in read().items() if key[0] not in sets}
    for which, name in names(*sets):
        sample = samples(which)[name]
        found[which, name] = entry(which, name, check_model(sample.make, sample.inputs(), trials=1))
        print(found[which, name].splitlines()[0], flush=True)
    FILE.write_text(_HEAD + "".join(f"\n{text}" for _, text in sorted(found.items())), encoding="utf-8")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from architectures import SETS

    write(sys.argv[1:] or list(SETS))
