"""Rules of recurrent layers: one order of the hidden neurons per layer and direction, shared by all gates and steps."""

from __future__ import annotations

import itertools
from typing import Any

from mergekit_ot import FunctionRule, Labels, NodeRule, OperationView, RuleError

# Blocks of rows in a recurrent weight: input, forget, cell and output gate; reset, update and new gate; none.
_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


class _Layer:
    """One layer in one direction: its weights, and the labels of its hidden and its cell state."""

    def __init__(
        self, operation: OperationView, gates: int, weights: list[Any], biases: list[Any], project: Any
    ) -> None:
        algebra = operation.algebra
        inputs, hidden = weights
        cell = algebra.atom(hidden.shape[0] // gates)
        for tensor in (inputs, hidden, *biases):
            algebra.touch(tensor.labels[0])
            blocks = algebra.split_product(tensor.labels[0], [gates, tensor.shape[0] // gates])
            if blocks is None:
                raise RuleError("the rows of a recurrent weight do not divide into its gates")
            if gates > 1:
                algebra.pin(blocks[0], "gates")
            cell = algebra.unify(cell, blocks[1])
        self.inputs = inputs
        self.cell = self.state = cell
        if project is not None:
            self.state = algebra.unify(algebra.atom(project.shape[0]), project.labels[0])
            algebra.unify(self.cell, project.labels[1])
            operation.contract(project, 1)
        algebra.unify(self.state, hidden.labels[1])
        operation.contract(hidden, 1)
        self.operation = operation

    def read(self, features: Any, batch: Any) -> None:
        """Reads the layer's input."""
        self.operation.algebra.unify(features, self.inputs.labels[1])
        self.operation.contract(self.inputs, 1)
        self.operation.loop([batch, features])


def _layers(operation: OperationView, gates: int) -> list[list[_Layer]]:
    """Returns the layers, each with its directions."""
    params = list(operation.argument("params"))
    count, directions = operation.argument("num_layers"), 2 if operation.argument("bidirectional") else 1
    each = len(params) // (count * directions)
    biases = 2 if operation.argument("has_biases") else 0
    layers = []
    for start in range(0, len(params), each):
        own = params[start : start + each]
        project = own[2 + biases] if each > 2 + biases else None
        layers.append(_Layer(operation, gates, own[:2], own[2 : 2 + biases], project))
    return [layers[start : start + directions] for start in range(0, len(layers), directions)]


def _start(operation: OperationView, value: Any, states: list[Any], batch: Any) -> Any:
    """Gives every layer's state the order of its part of an initial state."""
    algebra = operation.algebra
    units = algebra.cut(value.labels, 0, [1] * len(states))
    if units is None:
        algebra.pin(value.labels[0], "initial states of several layers")
        units = [value.labels] * len(states)
    for unit, state in zip(units, states, strict=True):
        algebra.unify(state, unit[-1])
        if len(unit) > 2:
            batch = algebra.unify(batch, unit[1])
    return batch


def _stacked(operation: OperationView, states: list[Any], between: Labels) -> Labels:
    algebra = operation.algebra
    return algebra.concat([[algebra.replicated(1), *between, state] for state in states], 0)


def _recurrent(kind: str) -> NodeRule:
    gates, has_cell = _GATES[kind], kind == "lstm"

    def rule(operation: OperationView) -> list[Labels]:
        algebra = operation.algebra
        is_packed = "data" in operation.arguments
        value = operation.value("data" if is_packed else "input")
        features, outer = value.labels[-1], list(value.labels[:-1])
        has_batch = len(outer) == 2
        # Steps follow each other; packed data mix steps and sequences on one axis.
        steps = 1 if operation.argument("batch_first") and has_batch else 0
        algebra.pin(outer[steps], "steps of a recurrence")
        batch = outer[1 - steps] if has_batch else algebra.replicated(1)
        layers = _layers(operation, gates)
        features = _read_through(operation, layers, features, batch)
        states = _states(layers, has_cell)
        for start, of_layers in zip(_starts(operation), states, strict=False):
            batch = _start(operation, start, of_layers, batch)
        outer[steps] = algebra.pinned(value.shape[steps], "packed sequences" if is_packed else "steps")
        between = [batch] if has_batch else []
        if is_packed:
            # The batch is no axis of packed data, but it is one of the states.
            between = [algebra.pinned(operation.output_shapes[1][1], "sequences sorted by length")]
        return [[*outer, features], *(_stacked(operation, of_layers, between) for of_layers in states)]

    return FunctionRule(rule)


def _read_through(operation: OperationView, layers: list[list[_Layer]], features: Any, batch: Any) -> Any:
    """Lets each layer read what the one before it makes, and returns what the last one makes."""
    for directions in layers:
        for layer in directions:
            layer.read(features, batch)
        features = operation.algebra.concat([[layer.state] for layer in directions], 0)[0]
    return features


def _states(layers: list[list[_Layer]], has_cell: bool) -> list[list[Any]]:
    """Returns the hidden states of all layers, and their cell states where they have any."""
    every = list(itertools.chain.from_iterable(layers))
    hidden = [layer.state for layer in every]
    return [hidden, [layer.cell for layer in every]] if has_cell else [hidden]


def _starts(operation: OperationView) -> list[Any]:
    """Returns the initial states that are given: hidden, and for an LSTM the cell's."""
    given = operation.argument("hx")
    return list(given) if isinstance(given, list | tuple) else [given]


def _cell(kind: str) -> NodeRule:
    gates, has_cell = _GATES[kind], kind == "lstm"

    def rule(operation: OperationView) -> list[Labels]:
        algebra = operation.algebra
        value = operation.value("input")
        weights = [operation.value("w_ih"), operation.value("w_hh")]
        biases = [bias for bias in map(operation.argument, ("b_ih", "b_hh")) if bias is not None]
        layer = _Layer(operation, gates, weights, biases, None)
        batch = value.labels[0] if len(value.labels) > 1 else algebra.replicated(1)
        layer.read(value.labels[-1], batch)
        for start in _starts(operation):
            algebra.unify(layer.state, start.labels[-1])
            if len(start.labels) > 1:
                batch = algebra.unify(batch, start.labels[0])
        state = [batch, layer.state] if len(value.labels) > 1 else [layer.state]
        return [list(state) for _ in range(2 if has_cell else 1)]

    return FunctionRule(rule)


def _pack(operation: OperationView) -> list[Labels]:
    """Steps and sequences become one axis in an order that the lengths decide; the features pass."""
    labels = operation.labels("input")
    for label in (*labels[:2], *operation.labels("lengths")):
        operation.algebra.pin(label, "packed by length")
    packed, sizes = operation.output_shapes
    return [
        [operation.algebra.pinned(packed[0], "packed by length"), *labels[2:]],
        [operation.algebra.pinned(sizes[0], "packed by length")],
    ]


def _unpack(operation: OperationView) -> list[Labels]:
    labels = operation.labels("data")
    for label in (labels[0], *operation.labels("batch_sizes")):
        operation.algebra.pin(label, "packed by length")
    shape, lengths = operation.output_shapes
    return [
        [*(operation.algebra.pinned(size, "unpacked") for size in shape[:2]), *labels[1:]],
        [operation.algebra.pinned(lengths[0], "unpacked")],
    ]


RECURRENT: dict[str, NodeRule] = {
    **{f"aten.{kind}": _recurrent(kind) for kind in _GATES},
    **{f"aten.{kind}_cell": _cell(kind) for kind in _GATES},
    "aten._pack_padded_sequence": FunctionRule(_pack),
    "aten._pad_packed_sequence": FunctionRule(_unpack),
}
