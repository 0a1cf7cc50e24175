"""Averages of networks whose neurons are taken as they stand: where nothing is aligned, nothing need be traced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from mergekit_ot.fusion.architecture import KnownArchitecture
from mergekit_ot.fusion.options import FusionOptions
from mergekit_ot.fusion.setup import FusionMethods, FusionSetup
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.fusion.tensors import computed
from mergekit_ot.fusion.tracing import is_same_architecture
from mergekit_ot.fusion.written import CheckedWriter, ResultCheck, template_of
from mergekit_ot.graph.capture.module_state import hidden_tensors, tied_names
from mergekit_ot.storage.fitting import FittedStore
from mergekit_ot.storage.store import MemoryWriter, StoreWriter
from mergekit_ot.transport.averaging import Share, mean_over_present
from mergekit_ot.transport.solver import Start

# Numbers that are averaged at a time: they stay in the processor's cache, and so few take no memory that counts.
PART = 1 << 17
_DEFAULTS = FusionOptions()


def needs_no_graph(
    sources: tuple[SourceModel, ...],
    target: object,
    methods: FusionMethods,
    options: FusionOptions,
    model_weights: tuple[float, ...],
) -> bool:
    """Whether the mean of sources is known without a graph: neurons stay, and every tensor is averaged or copied.

    A graph tells which buffers a forward reads, and with that which are averaged: where there are any but whole
    numbers, which are never averaged, it is needed.

    Args:
        sources: The sources, checked.
        target: Whose sizes the fused model takes.
        methods: How.
        options: What the user chose.
        model_weights: One per source.
    """
    first = sources[0].architecture
    return (
        _takes_neurons_as_they_stand(methods, options)
        and isinstance(target, int)
        and 0 <= target < len(sources)
        and model_weights[0] > 0
        and all(_is_one_architecture(first, source.architecture) for source in sources)
        and not hidden_tensors(first.outline)
        and all(_is_clear(name, tensor, _parameters(first)) for name, tensor in first.shapes.items())
    )


def _takes_neurons_as_they_stand(methods: FusionMethods, options: FusionOptions) -> bool:
    solver = methods.solver
    is_plain = solver.max_sweeps == 0 and solver.start is Start.IDENTITY and not solver.uses_signs
    needs_more = methods.repair is not None or methods.refinement is not None or methods.measure.needs_data
    needs_more |= options.fallback
    # Who names an executor or a front end wants steps or a trace.
    named = [(each.executor, each.front_end, each.restarts) for each in (options, _DEFAULTS)]
    return is_plain and not needs_more and named[0] == named[1]


def _is_one_architecture(one: KnownArchitecture, other: KnownArchitecture) -> bool:
    # Without values, what stands in no file cannot be compared.
    return one is other or (one.is_real and other.is_real and is_same_architecture(one.outline, other.outline))


def _parameters(architecture: KnownArchitecture) -> frozenset[str]:
    return frozenset(name for name, _ in architecture.outline.named_parameters(remove_duplicate=False))


def _is_clear(name: str, tensor: Tensor, parameters: frozenset[str]) -> bool:
    """Whether it is known without a graph if a tensor is averaged."""
    is_whole = not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
    is_filled = 0 not in tensor.shape
    return is_filled and (name in parameters or (is_whole and tensor.dtype is not torch.bool))


def averaged_as_they_stand(setup: FusionSetup, writer: StoreWriter | None = None) -> Mapping[str, Tensor]:
    """Returns the mean of sources that need no graph, written tensor by tensor.

    Args:
        setup: The fusion.
        writer: Takes the tensors; they stay in memory where there is none.

    Raises:
        ResultError: A tensor of the mean is not finite, though those of the sources are.
    """
    sources, target = setup.networks.sources, setup.networks.target
    template = template_of(target, sources)
    check = ResultCheck(template, sources, f"solver '{setup.methods.solver.name}'")
    written = CheckedWriter(MemoryWriter() if writer is None else writer, check)
    for name, tensor in _means(setup, template):
        written.write(name, tensor)
    for source in sources:
        source.state.check_all()
    written.close()
    fitted = FittedStore(written.reopened(), template)
    return dict(fitted) if writer is None else fitted


def _means(setup: FusionSetup, template: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yields every tensor of the mean; those that stand under several names are averaged once."""
    sources, architecture = setup.networks.sources, setup.networks.target.architecture
    aliases, parameters = tied_names(architecture.outline), _parameters(architecture)
    shared: dict[str, Tensor] = {}
    for name, tensor in template.items():
        described = aliases.get(name, name)
        mean = shared.get(described)
        if mean is None and name in parameters:
            mean = _mean(setup, described)
        elif mean is None:
            state = next((each.state for each in sources if name in each.state), None)
            mean = (tensor if state is None else state.read(name)).detach().clone()
        if described in aliases.values():
            shared[described] = mean
        yield name, mean


def _mean(setup: FusionSetup, name: str) -> Tensor:
    """Returns the mean of a parameter in the type of the first source, worked out part by part."""
    states = [source.state for source in setup.networks.sources]
    weights = [(number, weight) for number, weight in enumerate(setup.model_weights) if weight > 0]
    shares = [Share(weight, states[number].read(name).detach().reshape(-1)) for number, weight in weights]
    first = shares[0].values
    if not (first.is_floating_point() or first.is_complex() or first.dtype is torch.bool):
        return first.clone().reshape(states[0].shape(name))
    mean = torch.empty(states[0].shape(name), dtype=states[0].dtype(name))
    flat = mean.view(-1)
    for start in range(0, len(flat), PART):
        part = slice(start, start + PART)
        flat[part] = mean_over_present(
            share._replace(values=computed(share.values[part], setup.device)) for share in shares
        )
    return mean
