"""From file names to source models: read, checked against their architectures, with an input to trace them by."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mergekit_ot.checkpoint import Checkpoint, check_finite, load_checkpoint
from mergekit_ot.errors import ArchitectureError, RecipeError
from mergekit_ot.specs import Architecture, resolve_architecture

if TYPE_CHECKING:
    from mergekit_ot.plugin_manager import PluginManager

# A counter that older files lack; it takes no part in the function at evaluation.
_OPTIONAL_SUFFIX = "num_batches_tracked"


@dataclass(frozen=True)
class ReadSource:
    """A checkpoint together with the architecture that it fits.

    Attributes:
        checkpoint: What was read.
        make: Builds fresh instances of its architecture.
        state: The checkpoint's state, completed by counters that its file lacks.
    """

    checkpoint: Checkpoint
    make: Architecture
    state: Mapping[str, Tensor]

    @property
    def name(self) -> str:
        """The file name, as the user gave it."""
        return str(self.checkpoint.path)

    def module(self) -> nn.Module:
        """Returns a fresh module that holds the state."""
        module = self.make()
        module.load_state_dict(dict(self.state), strict=False)  # names and shapes were checked when it was read
        return module


def read_sources(
    paths: Sequence[str], arch: Sequence[str], manager: PluginManager, notify: Callable[[str], None]
) -> list[ReadSource]:
    """Reads checkpoints, in order, and checks every name and shape against the architectures before any work.

    Args:
        paths: The checkpoints.
        arch: No SPEC (each file carries its own), one for all, or one per checkpoint.
        manager: Whose formats and architectures are known.
        notify: Told what was found.

    Raises:
        CheckpointError: A file cannot be read, or holds NaN or infinity.
        ArchitectureError: No architecture is known for it, or the state does not fit.
        RecipeError: The number of architectures fits neither.
    """
    if len(arch) not in (0, 1, len(paths)):
        raise RecipeError(
            f"{len(arch)} architectures for {len(paths)} checkpoints: give --arch once for all, or once each."
        )
    checkpoints = []
    for path in paths:
        checkpoints.append(load_checkpoint(Path(path), manager))
        notify(f"{path}: {checkpoints[-1].found}")
    sources: list[ReadSource] = []
    for index, checkpoint in enumerate(checkpoints):
        spec = arch[index if len(arch) > 1 else 0] if arch else None
        make = _architecture_of(checkpoint, spec, manager)
        # One object per architecture: it is then traced once for all its checkpoints.
        make = next((other.make for other in sources if other.make == make), make)
        state = fit_state(checkpoint, make)
        check_finite(state, str(checkpoint.path))
        sources.append(ReadSource(checkpoint, make, state))
    return sources


def _architecture_of(checkpoint: Checkpoint, spec: str | None, manager: PluginManager) -> Architecture:
    if spec is not None:
        return resolve_architecture(spec, manager)
    if checkpoint.build is not None:
        return Architecture(f"the program in {checkpoint.path.name}", {}, checkpoint.build)
    if checkpoint.architecture is None:
        raise ArchitectureError(
            f"'{checkpoint.path}' does not say what its architecture is. Pass --arch SPEC: the class or function that "
            "builds the network, such as --arch nets.py:mlp."
        )
    # Only registered names: a file must not be able to name code.
    if checkpoint.architecture not in manager.architectures:
        known = ", ".join(sorted(manager.architectures)) or "none"
        raise ArchitectureError(
            f"'{checkpoint.path}' carries the architecture '{checkpoint.architecture}', which no installed plugin "
            f"registers (known: {known}). Install its plugin, or pass --arch SPEC."
        )
    return resolve_architecture(checkpoint.architecture, manager, checkpoint.arguments)


def fit_state(checkpoint: Checkpoint, make: Architecture) -> dict[str, Tensor]:
    """Returns the state in the architecture's order, after checking that names and shapes agree.

    Raises:
        ArchitectureError: Names the tensors that are missing or unexpected, or the first shape that differs.
    """
    expected, state = shapes_of(make), checkpoint.state
    missing = [name for name in expected if name not in state and not name.endswith(_OPTIONAL_SUFFIX)]
    unexpected = [name for name in state if name not in expected]
    if missing or unexpected:
        raise ArchitectureError(
            f"'{checkpoint.path}' does not fit architecture '{make.name}'. "
            + (f"Missing in the file: {_first(missing)}. " if missing else "")
            + (f"Not in the architecture: {_first(unexpected)}. " if unexpected else "")
            + "Check --arch and its arguments."
        )
    for name, tensor in expected.items():
        if name in state and state[name].shape != tensor.shape:
            raise ArchitectureError(
                f"'{checkpoint.path}' does not fit architecture '{make.name}': '{name}' is {_shape(state[name])} in "
                f"the file and {_shape(tensor)} in the architecture. Check --arch and its arguments."
            )
    counters = {name: torch.zeros(tensor.shape, dtype=tensor.dtype) for name, tensor in expected.items()
                if name not in state}  # fmt: skip
    return {name: state[name] if name in state else counters[name] for name in expected}


def shapes_of(make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Returns the state dict of a fresh instance, without memory for its tensors where that is possible."""
    return {name: value for name, value in on_meta(make).state_dict().items() if isinstance(value, Tensor)}


def on_meta(make: Callable[[], nn.Module]) -> nn.Module:
    """Returns a fresh instance on the meta device, or a real one where the constructor needs real tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with torch.device("meta"):
                return make()
        except Exception:
            return make()


def check_target(make: Architecture, spec: str) -> None:
    """Checks that a target architecture has neurons everywhere.

    Raises:
        ArchitectureError: Names the first parameter without any.
    """
    for name, tensor in shapes_of(make).items():
        if tensor.dim() and 0 in tensor.shape:
            raise ArchitectureError(
                f"Target '{spec}' has no neurons in '{name}' (shape {_shape(tensor)}): a fused layer needs at least "
                "one. Give a width of 1 or more."
            )


def example_inputs_of(
    source: ReadSource,
    input_shape: tuple[int, ...] | None,
    data: Iterable | None,
    notify: Callable[[str], None],
) -> tuple[tuple[Tensor, ...], tuple[int, ...] | None]:
    """Returns inputs to trace a source by, and the shape of one input without the batch axis (None for a guess).

    In this order: the shape that is given, the checkpoint's own, the first batch of the data, and at last the first
    plausible shape that a fresh instance accepts.

    Raises:
        ArchitectureError: No shape is known, or the model does not accept it.
    """
    if source.checkpoint.example_inputs is not None and source.checkpoint.build is source.make.build:
        return source.checkpoint.example_inputs, None
    shape = input_shape or source.checkpoint.input_shape
    if shape is not None:
        return (_accepted(source, shape),), shape
    if data is not None:
        inputs = next(iter(data))[0]
        parts = tuple(part[:2].clone() for part in (inputs if isinstance(inputs, tuple) else (inputs,)))
        return parts, tuple(parts[0].shape[1:]) if len(parts) == 1 else None
    for shape in _plausible_shapes(on_meta(source.make)):
        for inputs in _inputs_of(source.make, shape):
            if refusal(source.make, inputs) is None:
                kind = "token numbers" if inputs.dtype == torch.int64 else "numbers"
                shown = ",".join(map(str, shape))
                notify(
                    f"No input shape was given: {shown} ({kind}) is the first plausible one that {source.make.name} "
                    f"accepts. If it is wrong, pass --input-shape."
                )
                return (inputs,), None
    raise ArchitectureError(
        f"No plausible input shape was accepted by '{source.make.name}'. Pass the shape of one input without the batch "
        "axis, such as --input-shape 1,28,28, or --data SPEC."
    )


def _accepted(source: ReadSource, shape: tuple[int, ...]) -> Tensor:
    reasons = []
    for inputs in _inputs_of(source.make, shape):
        reason = refusal(source.make, inputs)
        if reason is None:
            return inputs
        reasons.append(reason)
    shown = ",".join(map(str, shape))
    raise ArchitectureError(
        f"'{source.make.name}' does not accept inputs of shape {shown} (batch axis first, 2 of them): {reasons[0]}. "
        "Correct --input-shape; it is the shape of one input without the batch axis."
    )


def _inputs_of(make: Callable[[], nn.Module], shape: tuple[int, ...]) -> list[Tensor]:
    """Candidates of one shape: numbers and token numbers, the likelier first."""
    tokens = next((m.num_embeddings for m in on_meta(make).modules() if isinstance(m, nn.Embedding)), None)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(2, *shape, generator=generator)
    if not tokens:
        return [numbers]
    return [torch.randint(tokens, (2, *shape), generator=generator), numbers]


def refusal(make: Callable[[], nn.Module], inputs: Tensor) -> str | None:
    """Returns why a fresh instance does not accept inputs, or None where it does."""
    reason = None
    for build, place in ((lambda: on_meta(make), "meta"), (make, "cpu")):
        try:
            module = build().eval()
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                module(inputs.to(place))
            return None
        except Exception as failure:
            reason = f"{type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else 'no message'}"
    return reason


def _plausible_shapes(module: nn.Module) -> list[tuple[int, ...]]:
    sides = (28, 32, 64, 224, 8, 96, 128)
    shapes: list[tuple[int, ...]] = []
    first = next((m for m in module.modules() if isinstance(m, _FIRST_LAYERS)), None)
    if isinstance(first, nn.Linear):
        width = first.in_features
        shapes = [(width,), (16, width)]
        for channels in (1, 3):
            side = round((width / channels) ** 0.5)
            shapes += [(channels, side, side)] if channels * side * side == width else []
    elif isinstance(first, nn.Conv1d):
        shapes = [(first.in_channels, length) for length in (128, 1024, 150, 784, 16000)]
    elif isinstance(first, nn.Conv2d):
        shapes = [(first.in_channels, side, side) for side in sides]
    elif isinstance(first, nn.Conv3d):
        shapes = [(first.in_channels, side, side, side) for side in (16, 32, 64)]
    elif isinstance(first, nn.Embedding):
        shapes = [(16,), (128,), (200,)]
    elif isinstance(first, nn.RNNBase):
        shapes = [(16, first.input_size), (28, first.input_size)]
    elif isinstance(first, nn.BatchNorm2d):
        shapes = [(first.num_features, side, side) for side in sides]
    images = [(channels, side, side) for side in sides for channels in (1, 3)]
    return list(dict.fromkeys([*shapes, *images]))


_FIRST_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding, nn.RNNBase, nn.BatchNorm2d)


def _first(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a scalar"
