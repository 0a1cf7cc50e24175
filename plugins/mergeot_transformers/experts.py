"""Stacked experts of a mixture: the hidden neurons of every expert have an order of their own.

Their forward gathers tokens by expert and calls a grouped product, which no rule of single operations can follow; as a
module they are two maps per expert. The experts themselves stay in order: the router's best ones are found by number.
"""

from __future__ import annotations

from mergekit_ot import FunctionRule, Labels, NodeRule, OperationView, RuleError, Value

_NAMES = (
    "DeepseekV2Experts",
    "DeepseekV3Experts",
    "DeepseekV3NaiveMoe",
    "Dots1NaiveMoe",
    "Glm4MoeNaiveMoe",
    "MixtralExperts",
    "OlmoeExperts",
    "Qwen2MoeExperts",
    "Qwen3MoeExperts",
    "PhimoeExperts",
    "FlexOlmoExperts",
    "Ernie4_5_MoeExperts",
    "MiniMaxExperts",
    "HunYuanMoEV1Experts",
)


def _experts(operation: OperationView) -> list[Labels]:
    """``(experts, 2 hidden, width)`` up and ``(experts, width, hidden)`` down, tokens ``(…, width)`` in and out."""
    algebra = operation.algebra
    up, down = operation.value("gate_up_proj"), operation.value("down_proj")
    data = _data(operation)
    (shape,) = operation.output_shapes
    tokens = next((value for value in data if value.shape[-1] == shape[-1] and value.is_floating), None)
    if tokens is None:
        raise RuleError("the tokens are not among what the module reads")
    experts = algebra.unify(up.labels[0], down.labels[0])
    algebra.pin(experts, "experts are chosen by their number")
    hidden = down.shape[2]
    rows = algebra.split_product(up.labels[1], [up.shape[1] // hidden, hidden])
    if rows is None:
        raise RuleError("the rows of an expert do not divide into gate and hidden neurons")
    algebra.pin(rows[0], "gate and value")
    algebra.touch(up.labels[1])
    inner = algebra.unify(down.labels[2], rows[1])
    width = algebra.unify(tokens.labels[-1], up.labels[2])
    operation.contract(up, 2)
    operation.contract(down, 2)
    operation.loop([experts, inner])
    operation.loop([*tokens.labels[:-1], width])
    operation.loop([*tokens.labels[:-1], down.labels[1]])
    for value in data:
        # Which experts a token goes to, and how much of each: one row per token, in the order of the tokens.
        for label in value.labels if value is not tokens else ():
            algebra.pin(label, "chosen experts of a token")
    for label in tokens.labels[:-1]:
        algebra.pin(label, "tokens are gathered by expert")
    outer = [algebra.pinned(size, "tokens") for size in shape[:-1]]
    return [[*outer, down.labels[1]]]


def _data(operation: OperationView) -> list[Value]:
    """Returns what the module reads besides its parameters."""
    values = [value for name, value in operation.arguments.items() if name.startswith("input")]
    return [value for value in values if value is not None]


EXPERTS: dict[str, NodeRule] = {f"module:{name}": FunctionRule(_experts) for name in _NAMES}
