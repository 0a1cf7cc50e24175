"""Capture of a module as a captured program: `torch.export` by itself, other front ends from plugins."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, distributions, nn

from mergekit_ot.errors import ArchitectureError, causes_of, unknown_name
from mergekit_ot.graph.capture.branches import reached_branches
from mergekit_ot.graph.capture.caching import caching_configurations
from mergekit_ot.graph.capture.copying import computing_when_read, copied
from mergekit_ot.graph.capture.front_end import (
    AUTO,
    EXPORT,
    AbstractFrontEnd,
    TraceBudget,
    TraceLimitError,
    TraceLimits,
)
from mergekit_ot.graph.capture.functional import functional
from mergekit_ot.graph.capture.inputs import describe, first_line, traced_inputs
from mergekit_ot.graph.capture.outputs import OutputError, hand_out_tensors
from mergekit_ot.graph.capture.program import CapturedProgram, from_exported

# Front ends by name: each gives an instance, loaded when it is first asked for.
FrontEndTable = Mapping[str, Callable[[], AbstractFrontEnd]]


class ExportFrontEnd(AbstractFrontEnd):
    """`torch.export`: functional, names every parameter, runs on the meta device.

    Example:
        >>> from mergekit_ot import TraceBudget, TraceLimits
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU()).eval()
        >>> program = ExportFrontEnd().capture(net, (torch.randn(2, 4),), TraceBudget(TraceLimits(), "net"))
        >>> [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        ['aten.linear.default', 'aten.relu.default']
    """

    shares_weights = True

    def capture(self, model: nn.Module, inputs: tuple[object, ...], budget: TraceBudget) -> CapturedProgram:
        """Returns the exported program without decompositions, so that a linear map stays one operation."""
        with budget.watching():
            program = torch.export.export(model, inputs, strict=False)
        budget.check("before in-place writes were removed")
        return from_exported(functional(program), EXPORT)


@dataclass(frozen=True)
class FrontEnds:
    """The front ends there are, and which of them is wanted.

    Attributes:
        further: Name → what gives a front end, besides ``export``.
        wanted: ``auto`` (export, then the fallbacks in order), ``export``, or the name of a further one.

    Example:
        >>> list(FrontEnds().in_order())
        ['export']
    """

    further: FrontEndTable = field(default_factory=dict)
    wanted: str = AUTO

    def in_order(self) -> dict[str, AbstractFrontEnd]:
        """Returns the front ends to try, one after the other.

        Raises:
            ArchitectureError: None has the name that is wanted.
        """
        if self.wanted == EXPORT:
            return {EXPORT: ExportFrontEnd()}
        if self.wanted != AUTO:
            if self.wanted not in self.further:
                raise ArchitectureError(unknown_name("front end", self.wanted, {AUTO, EXPORT, *self.further}))
            return {self.wanted: self.further[self.wanted]()}
        made = {name: make() for name, make in self.further.items()}
        return {EXPORT: ExportFrontEnd(), **{name: end for name, end in made.items() if end.is_fallback}}


def capture(
    model: nn.Module,
    example_inputs: Tensor | tuple[object, ...],
    front_ends: FrontEnds | None = None,
    budget: TraceBudget | None = None,
) -> CapturedProgram:
    """Returns the captured program of `model` in evaluation mode; the model itself is neither run nor changed.

    Args:
        model: Any module; it is copied first, so that nothing a forward leaves behind reaches it.
        example_inputs: A tensor or a tuple of positional inputs; a batch of one is doubled, since a size of one
            would hide the batch axis.
        front_ends: What captures it; ``export`` alone where left out.
        budget: Time and size so far; a new one with the default limits where left out.

    Raises:
        ArchitectureError: No front end can trace the module at these inputs, or a limit is passed.
    """
    inputs = traced_inputs(model, example_inputs)
    name = type(model).__name__
    budget = TraceBudget(TraceLimits(), name) if budget is None else budget
    failures: dict[str, BaseException] = {}
    for chosen, end in (front_ends or FrontEnds()).in_order().items():
        fresh = hand_out_tensors(prepared(copied(model, shares_weights=end.shares_weights)))
        try:
            with _quiet(), _unvalidated():
                program = end.capture(fresh, inputs, budget)
        except TraceLimitError:
            raise
        except Exception as error:
            _raise_without_tensor(error)
            failures[chosen] = error
            continue
        remarks = [
            f"Captured by '{chosen}', since '{other}' cannot trace this module: {first_line(error)}."
            for other, error in failures.items()
        ]
        return replace(
            program.without_weights(model.state_dict().keys()),
            remarks=(*remarks, *program.remarks),
            module_types=_module_types(model),
            branches=reached_branches(model, program.graph),
        )
    said = {chosen: first_line(error) for chosen, error in failures.items()}
    reasons = "; ".join(f"{chosen}: {line}" for chosen, line in said.items())
    raise ArchitectureError(
        f"'{name}' cannot be traced at inputs {describe(inputs)} ({reasons}). "
        f"{_advice(model, inputs, tuple(said.values()))}"
    ) from next(iter(failures.values()))


def _advice(model: nn.Module, inputs: tuple[object, ...], failures: Sequence[str]) -> str:
    """Returns what to do about a module that no front end can trace, as far as the reasons tell."""
    said = " ".join(failures).lower()
    kinds = sorted({str(each.dtype).removeprefix("torch.") for each in model.parameters() if each.is_floating_point()})
    given = {str(each.dtype).removeprefix("torch.") for each in inputs if isinstance(each, Tensor)}
    if any(word in said for word in ("dtype", "scalar type", "same type")) and kinds and not given & set(kinds):
        return f"Its weights are {' and '.join(kinds)}: give inputs of that type (example_inputs)."
    if len(set(failures)) == 1 and len(failures) > 1:
        return (
            "Forward itself raises this: call the module on these inputs, and correct the inputs (--input-shape, or "
            "example_inputs) or the module."
        )
    if "positional argument" in said:
        return "Give as many inputs as forward takes: example_inputs=(first, second), or --data with tuples of inputs."
    if any(word in said for word in ("shape", "size", "dimension", "channel")) and "depend" not in said:
        return "Check the input shape (--input-shape, or example_inputs)."
    return "Check the input shape (--input-shape, or example_inputs), and that forward has no branch on data."


def prepared(model: nn.Module) -> nn.Module:
    """Returns `model` in evaluation mode, as it is captured and as its function is compared.

    The cache of language models, which would pin every head, is left out.
    """
    for configuration in caching_configurations(model):
        configuration.use_cache = False
    return computing_when_read(model.eval())


def _module_types(model: nn.Module) -> dict[str, tuple[str, ...]]:
    return {path: _type_names(type(module)) for path, module in model.named_modules()}


def _type_names(kind: type) -> tuple[str, ...]:
    return tuple(f"{base.__module__}.{base.__qualname__}" for base in kind.__mro__ if base is not object)


def _raise_without_tensor(error: BaseException) -> None:
    """Raises what was said of an output without a tensor, however deep a front end wrapped it."""
    for cause in causes_of(error):
        if isinstance(cause, OutputError):
            raise cause from None


@contextlib.contextmanager
def _unvalidated() -> Iterator[None]:
    """Keeps distributions from branching on the values of their parameters, which no trace can follow."""
    kept = distributions.Distribution._validate_args
    distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        distributions.Distribution.set_default_validate_args(kept)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps torch.export from printing whole graphs when it fails."""
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
