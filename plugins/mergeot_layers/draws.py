"""Rules of operations that draw random numbers: a number per neuron holds the neurons in their order."""

from __future__ import annotations

from mergekit_ot import FunctionRule, Labels, NodeRule, OperationView

_DRAWN = "random numbers are drawn per neuron"


def _drawn(operation: OperationView) -> list[Labels]:
    """Numbers are drawn at new places, whatever the inputs say of shape or spread."""
    algebra = operation.algebra
    for value in operation.tensors:
        for label in value.labels:
            algebra.touch(label)
    outputs: list[Labels] = []
    for shape in operation.output_shapes:
        outputs.append([algebra.pinned(size, _DRAWN) if size > 1 else algebra.replicated(1) for size in shape])
    return outputs


def _from_each(operation: OperationView) -> list[Labels]:
    """Numbers are drawn from what stands at every place, so that all places keep their order."""
    for value in operation.tensors:
        for label in value.labels:
            operation.algebra.pin(label, _DRAWN)
    return _drawn(operation)


def _dropped(axes: int | None) -> NodeRule:
    """Dropout: the identity at evaluation; where it drops all the same, it does so per entry, or per channel."""

    def rule(operation: OperationView) -> list[Labels]:
        labels = operation.labels("input")
        drops = bool(operation.argument("train", False)) and operation.argument("p", 0.5) > 0
        for label in labels[:axes] if drops else ():
            operation.algebra.pin(label, _DRAWN)
        return [list(labels) for _ in operation.output_shapes]

    return FunctionRule(rule)


def _leaky(operation: OperationView) -> list[Labels]:
    """A leaky unit whose slope is drawn while it trains."""
    labels = operation.labels("self")
    if operation.argument("training", False):
        for label in labels:
            operation.algebra.pin(label, _DRAWN)
    for label in operation.labels("noise") if "noise" in operation.arguments else ():
        operation.algebra.touch(label)
    return [list(labels) for _ in operation.output_shapes]


_NEW = ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "uniform", "exponential")
_NEW += ("cauchy", "log_normal", "geometric", "random", "normal_functional", "bernoulli.p")
_OF_EACH = ("bernoulli", "normal", "poisson", "binomial", "multinomial", "_standard_gamma", "_sample_dirichlet")

DRAWS: dict[str, NodeRule] = {
    **{f"aten.{name}": FunctionRule(_drawn) for name in _NEW},
    **{f"aten.{name}": FunctionRule(_from_each) for name in _OF_EACH},
    **{f"aten.{name}": _dropped(None) for name in ("dropout", "alpha_dropout", "native_dropout")},
    **{f"aten.{name}": _dropped(2) for name in ("feature_dropout", "feature_alpha_dropout")},
    **{f"aten.{name}": FunctionRule(_leaky) for name in ("rrelu", "rrelu_with_noise", "rrelu_with_noise_functional")},
}
