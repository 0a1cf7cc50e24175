"""Guesses which biases of values and keys attention passes on or does not see."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, fx

from mergekit_ot.graph.capture.program import named_arguments, operation_name, shape_of
from mergekit_ot.graph.normal_form.maps import LinearMap, ProgramView
from mergekit_ot.graph.normal_form.rewrites import MoveBias, Reader, Refusal
from mergekit_ot.graph.normal_form.tracking import IDENTITIES, VIEWS, along, is_movement, moved, neurons_in, numbered

_FUSED = frozenset(("aten.scaled_dot_product_attention",))
_SOFTMAX = frozenset(("aten.softmax", "aten._softmax", "aten._safe_softmax"))
_PRODUCTS = {"aten.matmul": ("self", "other"), "aten.bmm": ("self", "mat2"), "aten.baddbmm": ("batch1", "batch2")}
# What may stand between the scores and softmax: it leaves a number that is the same for all keys.
_SHIFTS = frozenset(("aten.add", "aten.sub"))
_SCALINGS = frozenset(("aten.mul", "aten.div"))


@dataclass
class _Flow:
    """What reads the numbers of one linear map: entries that are keys, values, or anything else."""

    keys: set[int] = field(default_factory=set)
    values: set[int] = field(default_factory=set)
    other: set[int] = field(default_factory=set)
    readers: dict[tuple[Reader, tuple[int, ...]], LinearMap] = field(default_factory=dict)
    why: str = ""


def guess_moves(view: ProgramView) -> tuple[list[MoveBias], list[Refusal]]:
    """Returns the biases of attention that the data flow lets go away, and why others stay."""
    moves: list[MoveBias] = []
    refusals: list[Refusal] = []
    if not any(operation_name(node) in _FUSED | _SOFTMAX for node in view.nodes):
        return moves, refusals
    for linear_map in view.maps.values():
        if linear_map.bias is not None and linear_map.axis == -1:
            move, refusal = _guess(view, linear_map)
            moves += [move] if move is not None else []
            refusals += [refusal] if refusal is not None else []
    return moves, refusals + _hidden_keys(view, moves)


def _guess(view: ProgramView, linear_map: LinearMap) -> tuple[MoveBias | None, Refusal | None]:
    bias, start = linear_map.reader.bias, linear_map.reader.bias_start
    shape = shape_of(linear_map.output.meta.get("val"))
    if bias is None or not shape:
        return None, None
    flow = _Flow()
    _follow(view, linear_map.output, numbered(shape, len(shape) - 1, start), flow)
    keys = flow.keys - flow.values - flow.other
    values = flow.values - flow.keys - flow.other
    if not keys and not values:
        return None, Refusal(bias, flow.why) if flow.why else None
    if not _is_read_once(view, linear_map):
        return None, Refusal(bias, "It is read in several places of the model.")
    readers = {pair: reading for pair, reading in flow.readers.items() if values.issuperset(pair[1])}
    why = flow.why or _why_unmoved(view, readers)
    if why:
        values, readers = set[int](), {}
    entries = tuple(sorted(keys | values))
    written = [bias, *(reader.bias for reader, _ in readers if reader.bias is not None)]
    move = MoveBias(view.tied(iter(written)), bias, entries, tuple(readers)) if entries else None
    return move, Refusal(bias, why) if why else None


def _why_unmoved(view: ProgramView, readers: dict[tuple[Reader, tuple[int, ...]], LinearMap]) -> str:
    """Returns why a bias of values cannot go into the biases of what reads them; empty where it can."""
    seen: set[tuple[str | None, int]] = set()
    for (reader, _), linear_map in readers.items():
        if reader.bias is None:
            return f"The output projection '{reader.weight.name}' has no bias that could take it."
        if not _is_read_once(view, linear_map) or (reader.bias, reader.bias_start) in seen:
            return f"'{reader.bias}' is read in several places of the model."
        seen.add((reader.bias, reader.bias_start))
    return ""


def _is_read_once(view: ProgramView, linear_map: LinearMap) -> bool:
    """Whether nothing else reads the entries of a map's bias."""
    bias = linear_map.bias
    for node in view.readers_of(bias.name) if bias is not None else ():
        other = view.maps.get(node) or view.by_output.get(node)
        if other is None or bias is None:
            return False
        if other is not linear_map and (other.bias is None or other.bias.overlaps(bias)):
            return False
    return True


def _follow(view: ProgramView, start: fx.Node, neurons: Tensor, flow: _Flow) -> None:
    """Follows the numbers of a map to all that reads them."""
    tracked: dict[fx.Node, object] = {start: neurons}
    waiting = [start]
    while waiting:
        node = waiting.pop(0)
        for user in view.users(node):
            if user in tracked:
                continue
            result = moved(user, tracked)
            if result is not None:
                tracked[user] = result
                waiting.append(user)
            else:
                _read(view, user, node, tracked, flow)


def _read(view: ProgramView, user: fx.Node, node: fx.Node, tracked: dict[fx.Node, object], flow: _Flow) -> None:
    """Enters in the flow what an operation does with tracked numbers."""
    neurons = tracked[node]
    if not isinstance(neurons, Tensor):
        flow.other |= set[int]().union(*map(neurons_in, neurons))  # type: ignore[arg-type]
        return
    entries = neurons_in(neurons)
    roles = _roles(user, node)
    if roles == ["key"] and along_keys(user, neurons) and _reaches_softmax(view, user):
        flow.keys |= entries
    elif roles == ["value"] and (mixed := _mixed(user, neurons)) is not None:
        flow.values |= entries
        _project(view, user, mixed, flow)
    else:
        flow.other |= entries


def _roles(user: fx.Node, node: fx.Node) -> list[str]:
    """Returns as what an attention reads a value: query, key, value."""
    operation, arguments = operation_name(user), named_arguments(user)
    if operation in _FUSED:
        return [name for name in ("query", "key", "value") if arguments[name] is node]
    if operation not in _PRODUCTS:
        return []
    first, second = (arguments[name] for name in _PRODUCTS[operation])
    if first is node:
        return ["query"]
    if second is not node:
        return []
    return ["value"] if _is_weights(first) and not _has_bias(user) else ["key"]


def _has_bias(user: fx.Node) -> bool:
    return operation_name(user) == "aten.baddbmm"


def _is_weights(node: fx.Node) -> bool:
    """Whether a value is what softmax over its last axis gives, moved without its last axis."""
    while operation_name(node) not in _SOFTMAX:
        operation = operation_name(node)
        shape = shape_of(node.meta.get("val")) or (0,)
        is_kept = operation in IDENTITIES | VIEWS or operation == "aten.expand"
        if not is_kept or not isinstance(node.args[0], fx.Node):
            return False
        before = shape_of(node.args[0].meta.get("val")) or (0,)
        if shape[-1] != before[-1]:
            return False
        node = node.args[0]
    return _is_last(node)


def _is_last(softmax: fx.Node) -> bool:
    rank = len(shape_of(softmax.meta.get("val")) or ())
    return named_arguments(softmax)["dim"] % max(rank, 1) == rank - 1


def along_keys(user: fx.Node, neurons: Tensor) -> bool:
    """Whether tracked keys are alike for all tokens."""
    axis = -2 if operation_name(user) in _FUSED else -1
    return bool((neurons == neurons.narrow(axis, 0, 1)).all())


def _reaches_softmax(view: ProgramView, scores: fx.Node) -> bool:
    """Whether scores go to softmax over the keys alone, through what is the same for all keys of a query."""
    if operation_name(scores) in _FUSED:
        return True
    waiting, reached = [scores], False
    while waiting:
        node = waiting.pop()
        for user in view.users(node):
            operation = operation_name(user)
            if operation in _SOFTMAX:
                if not _is_last(user):
                    return False
                reached = True
            elif _keeps_shifts(user, node):
                waiting.append(user)
            else:
                return False
    return reached


def _keeps_shifts(user: fx.Node, node: fx.Node) -> bool:
    """Whether scores that differ by a number per query still do so behind an operation."""
    operation = operation_name(user)
    if operation in IDENTITIES or operation == "aten.masked_fill":
        return user.args[0] is node
    before, after = shape_of(node.meta.get("val")) or (0,), shape_of(user.meta.get("val")) or (0,)
    if operation in VIEWS:
        return before[-1] == after[-1]
    others = [argument for argument in user.args[:2] if argument is not node]
    if operation in _SHIFTS:
        return before == after and len(others) == 1
    return operation in _SCALINGS and len(others) == 1 and isinstance(others[0], int | float)


def _mixed(user: fx.Node, neurons: Tensor) -> Tensor | None:
    """Returns the neurons of what attention makes of values: theirs, where they are alike for all tokens."""
    if not bool((neurons == neurons.narrow(-2, 0, 1)).all()):
        return None
    result = shape_of(user.meta.get("val"))
    if result is None or result[-1] != neurons.shape[-1]:
        return None
    first = neurons.narrow(-2, 0, 1)
    if operation_name(user) in _FUSED and first.ndim > 2 and first.shape[-3] not in (1, result[-3]):
        # Groups of queries share keys and values.
        first = first.repeat_interleave(result[-3] // first.shape[-3], -3)
    return first.expand(result)


def _project(view: ProgramView, attention: fx.Node, mixed: Tensor, flow: _Flow) -> None:
    """Follows what attention makes of values to the output projections."""
    tracked: dict[fx.Node, object] = {attention: mixed}
    waiting = [attention]
    while waiting:
        node = waiting.pop(0)
        for user in view.users(node):
            result = moved(user, tracked) if user not in tracked else None
            linear_map = view.maps.get(user)
            neurons = tracked[node]
            if result is not None:
                tracked[user] = result
                waiting.append(user)
            elif linear_map is not None and linear_map.source is node and isinstance(neurons, Tensor):
                line = along(neurons, linear_map.axis)
                if line is None:
                    flow.why = f"What attention makes of it is not alike for all tokens at {view.where(user)}."
                else:
                    flow.readers[linear_map.reader, tuple(int(n) for n in line)] = linear_map
            elif user not in tracked:
                flow.why = f"What attention makes of it is read by {view.where(user)} before the output projection."


def _hidden_keys(view: ProgramView, moves: list[MoveBias]) -> list[Refusal]:
    """Returns why biases of keys stay that are changed on their way to the attention, as by rotary positions."""
    gone = {(move.bias, entry) for move in moves for entry in move.entries}
    refusals: dict[str, Refusal] = {}
    for node in view.nodes:
        if operation_name(node) not in _FUSED or node not in view.live:
            continue
        for linear_map, change in _makers(view, named_arguments(node)["key"]):
            bias, start = linear_map.reader.bias, linear_map.reader.bias_start
            is_gone = any((bias, start + entry) in gone for entry in range(linear_map.outputs))
            if bias is not None and change is not None and not is_gone:
                why = f"Its keys go through {view.where(change)} before the attention (as under rotary positions)"
                refusals[bias] = Refusal(bias, f"{why}, so softmax sees it.")
    return list(refusals.values())


def _makers(view: ProgramView, key: fx.Node) -> Iterator[tuple[LinearMap, fx.Node | None]]:
    """Yields the linear maps that make a key, each with an operation on the way that is no movement."""
    seen: set[fx.Node] = set()
    waiting: list[tuple[fx.Node, fx.Node | None]] = [(key, None)]
    while waiting:
        node, change = waiting.pop()
        if node in seen or node.op == "placeholder":
            continue
        seen.add(node)
        if node in view.by_output:
            yield view.by_output[node], change
            continue
        change = change if is_movement(node) else node
        waiting += [(used, change) for used in node.all_input_nodes]
