"""What two networks differ by where they cannot be fused as they are, in the words of who trained them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mergekit_ot.errors import GraphMismatchError
from mergekit_ot.graph.layouts import AxisLayout, Blocks, Choice, Factors, Fixed, Neurons, layout_size, shape_free

_ONE_ARCHITECTURE = "Sources must share one architecture up to neuron counts: check --arch for each checkpoint."
# The operation that pins what a network gives out.
OUTPUT = "output"
_EMBEDDING, _CONVOLUTION = "embedding", "conv"


class Described(Protocol):
    """A graph, as far as two are compared here."""

    @property
    def layouts(self) -> Mapping[str, tuple[AxisLayout, ...]]:
        """Parameter → one layout per axis."""
        ...

    @property
    def groups(self) -> Mapping[str, Any]:
        """Key → group."""
        ...

    @property
    def roles(self) -> Mapping[tuple[str, int, str], str]:
        """(parameter, axis, group key) → role."""
        ...

    @property
    def operations(self) -> Any:
        """Operations, values and parameters; an edge is a use."""
        ...


@dataclass(frozen=True)
class _Sides:
    """Two networks and their names: the one whose sizes are taken, and another."""

    mine: Described
    theirs: Described
    names: tuple[str, str]


def check_same_structure(
    fused: Described, other: Described, mine: str, theirs: str, kept: Collection[str] = ()
) -> None:
    """Checks that a network differs from another by the sizes of free groups only.

    Args:
        fused: The network whose sizes are taken.
        other: Another one.
        mine: Name of the first.
        theirs: Name of the other.
        kept: Parameters that come from one network as they are: of these, axes that stay in place may differ.

    Raises:
        GraphMismatchError: Says what differs, names the first parameter that does, and says what to do.
    """
    sides = _Sides(fused, other, (mine, theirs))
    _check_names(sides)
    different = {name: axis for name in fused.layouts if (axis := first_difference(fused, other, name)) is not None}
    grouped = _grouped(sides, different)
    for name, axis in different.items():
        if grouped and (name not in kept or not _is_fixed_alone(fused.layouts[name], other.layouts[name])):
            raise GraphMismatchError(f"{grouped} {_ONE_ARCHITECTURE}")
        if name not in kept:
            raise GraphMismatchError(_said(sides, name, axis, [each for each in different if each not in kept]))
        if not _is_fixed_alone(fused.layouts[name], other.layouts[name]):
            raise GraphMismatchError(_structure(sides, name, axis))


def first_difference(fused: Described, other: Described, name: str) -> int | None:
    """Returns the first axis of a parameter on which graphs differ by more than the sizes of free groups.

    Args:
        fused: A graph.
        other: Another one, which has the parameter too.
        name: The parameter.
    """
    ours, others = fused.layouts[name], other.layouts[name]
    for axis, (layout, theirs) in enumerate(zip(ours, others, strict=False)):
        if len(ours) != len(others) or shape_free(layout) != shape_free(theirs):
            return axis
    return None


def _check_names(sides: _Sides) -> None:
    for (one, here), (other, there) in (
        ((sides.mine, sides.names[0]), (sides.theirs, sides.names[1])),
        ((sides.theirs, sides.names[1]), (sides.mine, sides.names[0])),
    ):
        name = next((name for name in one.layouts if name not in other.layouts), None)
        if name is not None:
            said = f"Parameter '{name}' of {here} does not exist in {there}."
            raise GraphMismatchError(f"{_depth(sides, name)}{said} {_ONE_ARCHITECTURE}")


def _depth(sides: _Sides, name: str) -> str:
    """Returns a sentence on the numbers of blocks, where a parameter stands in one that the other network lacks."""
    for found in re.finditer(r"\.(\d+)(?=\.|$)", f".{name}"):
        path = name[: max(found.start() - 1, 0)]
        counts = [_blocks_at(path, graph.layouts) for graph in (sides.mine, sides.theirs)]
        if all(counts) and counts[0] != counts[1]:
            where = f"of '{path}' " if path else ""
            mine, theirs = sides.names
            return (
                f"The depth differs: {mine} has {_counted(counts[0], 'layer')} {where}and {theirs} has {counts[1]}. "
                "Networks of different depth are fused where blocks add to a residual stream and have the same sizes. "
            )
    return ""


def _blocks_at(path: str, names: Collection[str]) -> int:
    prefix = f"{path}." if path else ""
    heads = (name.removeprefix(prefix).partition(".")[0] for name in names if name.startswith(prefix))
    return len({head for head in heads if head.isdigit()})


def _said(sides: _Sides, name: str, axis: int, different: Sequence[str]) -> str:
    """Returns what differs at an axis, why it cannot be resized, and what to do."""
    ours, theirs = sides.mine.layouts[name], sides.theirs.layouts[name]
    if not _is_fixed_alone(ours, theirs):
        return _structure(sides, name, axis)
    pin = _pin(sides.mine, name, axis)
    why = "" if pin is None else f" It cannot be resized: {pin}."
    what = _sizes(sides, name, axis)
    return f"{what} ('{name}', axis {axis}).{why} {_way_out(sides, name, axis, different)}"


def _sizes(sides: _Sides, name: str, axis: int) -> str:
    """Returns what an axis that stays in place counts, and how many of it there are."""
    (here, there), pin = sides.names, _pin(sides.mine, name, axis)
    ours, theirs = (graph.layouts[name][axis] for graph in (sides.mine, sides.theirs))
    sizes = [layout_size(layout) for layout in (ours, theirs)]
    operation = "" if pin is None else pin.operation
    if _is_output(sides.mine, name, axis):
        of_tokens = _reads_tokens(sides.mine, name)
        if of_tokens:
            return f"The vocabularies have {sizes[0]} and {sizes[1]} tokens in {here} and {there}"
        return f"The heads have {sizes[0]} and {sizes[1]} classes (outputs) in {here} and {there}"
    if _EMBEDDING in operation and axis == 0:
        if _reads_tokens(sides.mine, name):
            return f"The vocabularies have {sizes[0]} and {sizes[1]} tokens in {here} and {there}"
        return f"The position embeddings have {sizes[0]} and {sizes[1]} places in {here} and {there}"
    turned = [_turned(layout) for layout in (ours, theirs)]
    if all(turned):
        return (
            f"The heads of {here} have {turned[0]} dimensions and those of {there} have {turned[1]}, and rotary "
            "embeddings turn them by their places"
        )
    if _CONVOLUTION in operation and isinstance(ours, Fixed):
        return f"The kernels have {sizes[0]} and {sizes[1]} places in {here} and {there}"
    return f"Axis {axis} of parameter '{name}' has {sizes[0]} places in {here} but {sizes[1]} in {there}"


def _way_out(sides: _Sides, name: str, axis: int, different: Sequence[str]) -> str:
    keeps = " ".join(f"--keep '{glob}'" for glob in _globs(different))
    kept = f"Keep what differs from the model whose sizes are taken (--target) and fuse the rest: {keeps}"
    if _reads_tokens(sides.mine, name):
        return f"{kept}. A row belongs to a token, and rows of different tokens are never averaged."
    if _is_output(sides.mine, name, axis):
        return f"{kept}; or get the heads of all: --head both."
    if all(_turned(graph.layouts[name][axis]) for graph in (sides.mine, sides.theirs)):
        return "Heads of different size cannot be fused under them."
    return f"{_ONE_ARCHITECTURE} Or: {kept[0].lower()}{kept[1:]}."


def _structure(sides: _Sides, name: str, axis: int) -> str:
    """Returns what differs where neurons stand in other ways."""
    (here, there), pin = sides.names, _pin(sides.mine, name, axis)
    ours, theirs = (_plain(graph.layouts[name][axis]) for graph in (sides.mine, sides.theirs))
    said = f"is {ours} in {here} but {theirs} in {there}"
    if ours == theirs:
        said = f"is {ours} in both, and they belong to other layers in {here} than in {there}"
    why = "" if pin is None else f" It cannot be resized: {pin}."
    return f"Axis {axis} of parameter '{name}' {said}.{why} {_ONE_ARCHITECTURE}"


def _grouped(sides: _Sides, different: Mapping[str, int]) -> str:
    """Returns a sentence on queries that share keys in one network and not in the other; empty where that is not it."""
    for name, axis in different.items():
        ours, theirs = (graph.layouts[name][axis] for graph in (sides.mine, sides.theirs))
        is_attention = all(map(_turned, (ours, theirs))) or re.search(r"(^|[._])[qkv](_|\.|$)|quer|att|qkv", name)
        if len(_factors(ours)) != len(_factors(theirs)) and is_attention:
            heads, (here, there) = [_leading(layout) or 1 for layout in (ours, theirs)], sides.names
            return (
                f"Grouped queries: {here} has {_counted(heads[0], 'key head')} and {there} has {heads[1]} ('{name}', "
                f"axis {axis}). Where every query has a key head of its own, or all share one, heads stand in other "
                "ways: both have to group their queries, or neither."
            )
    return ""


def _pin(graph: Described, name: str, axis: int) -> Any:
    pins = (
        group.pin for group in graph.groups.values() if group.pin is not None and (name, axis, group.key) in graph.roles
    )
    return next(pins, None)


def _is_output(graph: Described, name: str, axis: int) -> bool:
    pin = _pin(graph, name, axis)
    return pin is not None and pin.operation == OUTPUT


def _reads_tokens(graph: Described, name: str) -> bool:
    """Whether the rows of a parameter belong to tokens: numbers among the inputs look them up, or are its outputs."""
    tables = [table for table in graph.layouts if _is_token_table(graph, table)]
    return name in tables or layout_size(graph.layouts[name][0]) in {
        layout_size(graph.layouts[table][0]) for table in tables
    }


def _is_token_table(graph: Described, name: str) -> bool:
    pin = _pin(graph, name, 0)
    if pin is None or _EMBEDDING not in pin.operation:
        return False
    looked_up = [
        key
        for key, data in graph.operations.nodes(data=True)
        if _EMBEDDING in str(data.get("operation", "")) and data.get("module_path") == pin.module_path
    ]
    return any(_is_input(graph, before) for key in looked_up for before in _before(graph, key))


def _before(graph: Described, operation: str) -> Iterator[str]:
    """Yields all that an operation is made from."""
    waiting, seen = [operation], set[str]()
    while waiting:
        for before in graph.operations.predecessors(waiting.pop()):
            if before not in seen:
                seen.add(before)
                waiting.append(before)
                yield before


def _is_input(graph: Described, operation: str) -> bool:
    is_placeholder = graph.operations.nodes[operation].get("kind") == "placeholder"
    # Captures call parameters, buffers and constants by these letters.
    return is_placeholder and not operation.startswith(("p_", "b_", "c_"))


def _is_fixed_alone(ours: Sequence[AxisLayout], theirs: Sequence[AxisLayout]) -> bool:
    """Whether two descriptions differ by the sizes of what stays in place, and by those of groups, alone."""
    return [_sizeless(layout) for layout in ours] == [_sizeless(layout) for layout in theirs]


def _sizeless(layout: AxisLayout) -> object:
    if isinstance(layout, Neurons):
        return layout.group
    if isinstance(layout, Fixed):
        return None
    inner = layout.options if isinstance(layout, Choice) else layout.parts
    return type(layout).__name__, tuple(map(_sizeless, inner))


def _factors(layout: AxisLayout) -> tuple[AxisLayout, ...]:
    return layout.parts if isinstance(layout, Factors) else (layout,)


def _leading(layout: AxisLayout) -> int:
    """Returns the number of neurons that come first on an axis of several factors; 0 where there are none."""
    first = _factors(layout)[0]
    return first.size if isinstance(layout, Factors) and isinstance(first, Neurons) else 0


def _turned(layout: AxisLayout) -> int:
    """Returns the dimensions of heads that are turned in pairs, one of each half; 0 where nothing is."""
    last = _factors(layout)[-1]
    if not isinstance(last, Blocks) or not all(isinstance(part, Fixed) for part in last.parts):
        return 0
    return layout_size(last) if len(set(map(layout_size, last.parts))) == 1 and len(last.parts) > 1 else 0


def _plain(layout: AxisLayout) -> str:
    """Returns the sizes that stand on an axis."""
    if isinstance(layout, Factors):
        return " × ".join(f"({_plain(part)})" if isinstance(part, Blocks) else _plain(part) for part in layout.parts)
    if isinstance(layout, Blocks):
        return " + ".join(map(_plain, layout.parts))
    if isinstance(layout, Neurons):
        return f"{layout.size} neurons"
    return f"{layout_size(layout)} that stay in place" if isinstance(layout, Fixed) else str(layout_size(layout))


def _globs(names: Sequence[str]) -> list[str]:
    """Returns what names the modules that parameters belong to."""
    modules = (name.rpartition(".")[0] for name in names)
    return list(dict.fromkeys(f"{module}.*" if module else name for module, name in zip(modules, names, strict=True)))


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
