"""A network gets as many blocks as a deeper one has; those that are new compute nothing, and its function stays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from mergekit_ot.errors import GraphMismatchError
from mergekit_ot.fusion.depth.deepened import DeepenedStore
from mergekit_ot.fusion.depth.likeness import UpdateLikeness, WeightLikeness, update_likeness
from mergekit_ot.fusion.depth.matching import match_in_order
from mergekit_ot.fusion.depth.series import DepthDifference, Series, Shapes, depth_difference
from mergekit_ot.fusion.running import Runner, difference
from mergekit_ot.fusion.source import SourceModel
from mergekit_ot.graph.capture.inputs import as_inputs

# Batches of the calibration data in which blocks are compared.
_BATCHES = 3
_BY_DATA, _BY_WEIGHTS, _BY_PLACES = "calibration data", "weights", "places"


@final
@dataclass(frozen=True)
class Deepening:
    """A network with blocks that compute nothing, and where its own stand.

    Attributes:
        model: The network in the architecture of the deeper one; it computes what it computed.
        like: Name of the deeper network.
        blocks: Path of a block of the deeper network → path of the own block that stands there; None where none does.
        seen_by: What blocks were compared by: ``calibration data``, ``weights``, or ``places`` alone.

    Example:
        >>> deepening = Deepening(SourceModel.of(nn.Linear(2, 2), "a.pt"), "b.pt", {"0": "0", "1": None}, "weights")
        >>> deepening.inserted
        ('1',)
    """

    model: SourceModel
    like: str
    blocks: Mapping[str, str | None]
    seen_by: str

    @property
    def inserted(self) -> tuple[str, ...]:
        """Paths of the blocks that compute nothing."""
        return tuple(path for path, own in self.blocks.items() if own is None)

    @property
    def sentence(self) -> str:
        """What was done, for the reader."""
        matched = ", ".join(f"{own} at {path}" for path, own in self.blocks.items() if own is not None)
        by = "their places" if self.seen_by == _BY_PLACES else f"the {self.seen_by}"
        count = len(self.inserted)
        added = "1 that computes nothing was added" if count == 1 else f"{count} that compute nothing were added"
        return (
            f"'{self.model.name}' was deepened to the {len(self.blocks)} blocks of '{self.like}': {added}, and its "
            f"function stayed to the last bit. Blocks matched by {by}: {matched or 'none'}."
        )

    def as_json(self) -> dict[str, Any]:
        """Returns it as plain data."""
        return {
            "source": self.model.name,
            "like": self.like,
            "blocks": dict(self.blocks),
            "inserted": len(self.inserted),
            "seen_by": self.seen_by,
        }


def deepen(
    model: nn.Module | SourceModel,
    like: nn.Module | SourceModel,
    *,
    example_inputs: Tensor | tuple[object, ...],
    data: Iterable[Any] = (),
) -> Deepening:
    """Returns a network with as many blocks as a deeper one: blocks of zeros between its own, by which nothing changes.

    Its blocks are matched to the other's in order, each to the one that does the most similar thing to the residual
    stream (CKA of what blocks add, arXiv:1905.00414, on calibration data; by the sizes of their weights where there
    are none). Zero weights behind a norm, a linear map or a BatchNorm add nothing, so only blocks that add to a stream
    can be inserted; the outputs of both networks are compared, and must be equal.

    Args:
        model: The network with fewer blocks.
        like: A network of the same sizes with more blocks.
        example_inputs: Inputs of the shapes that both take.
        data: Calibration batches of inputs, by which blocks are compared.

    Raises:
        GraphMismatchError: The networks differ by more than blocks, or blocks of zeros change the function.

    Example:
        >>> class Block(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
        ...     def forward(self, x):
        ...         return x + self.down(self.up(x).relu())
        >>> shallow, deep = (nn.Sequential(*(Block() for _ in range(count))) for count in (2, 3))
        >>> deepened = deepen(shallow, deep, example_inputs=torch.randn(5, 4))
        >>> len(deepened.blocks), len(deepened.inserted)
        (3, 1)
        >>> x = torch.randn(7, 4)
        >>> bool((deepened.model.instance()(x) == shallow(x)).all())
        True
    """
    shallow, deep = SourceModel.of(model, "the model"), SourceModel.of(like, "the deeper model")
    found = depth_difference(shapes_of(shallow), shapes_of(deep))
    if found is None:
        raise GraphMismatchError(
            f"'{shallow.name}' and '{deep.name}' differ by more than blocks in a row, of which '{deep.name}' has more: "
            "names and shapes outside the blocks, and of the blocks, have to be the same. Give networks of one width."
        )
    return deepened(shallow, deep, found, as_inputs(example_inputs), tuple(map(as_inputs, data)))


def shapes_of(source: SourceModel) -> Shapes:
    """Returns name → shape of the architecture of a source."""
    return {name: tensor.shape for name, tensor in source.architecture.shapes.items()}


def deepened(
    shallow: SourceModel,
    deep: SourceModel,
    found: DepthDifference,
    inputs: tuple[object, ...],
    batches: Sequence[tuple[object, ...]] = (),
) -> Deepening:
    """Returns a network with as many blocks as a deeper one.

    Args:
        shallow: The network.
        deep: The deeper one; it may have no weights.
        found: What they differ by.
        inputs: To compare functions with.
        batches: To compare blocks with.

    Raises:
        GraphMismatchError: The function changes.
    """
    likeness, seen_by = _likeness(shallow, deep, found, batches)
    blocks: dict[str, str | None] = {}
    for series in found.series:
        matched = match_in_order(series.costs(likeness.costs(series))) or ()
        places, own = list(series.deep), list(series.shallow)
        blocks |= dict.fromkeys(places)
        blocks |= {places[place]: own[number] for number, place in enumerate(matched)}
    model = SourceModel(shallow.name, deep.architecture, _state(shallow, deep, found, blocks))
    apart = _apart(shallow, model, (inputs, *batches[:1]))
    if apart:
        raise _refused(shallow, deep, found.series[0], apart)
    repeated = {path: blocks[path] for series in found.series for path in series.repeated}
    return Deepening(model, deep.name, repeated, seen_by)


def _likeness(
    shallow: SourceModel, deep: SourceModel, found: DepthDifference, batches: Sequence[tuple[object, ...]]
) -> tuple[WeightLikeness | UpdateLikeness, str]:
    """Returns how blocks are compared, and in one word by what."""
    if not deep.state:
        return WeightLikeness(shallow, deep), _BY_PLACES
    seen = update_likeness(shallow, deep, found.series, batches[:_BATCHES]) if batches else None
    return (WeightLikeness(shallow, deep), _BY_WEIGHTS) if seen is None else (seen, _BY_DATA)


def _state(
    shallow: SourceModel, deep: SourceModel, found: DepthDifference, blocks: Mapping[str, str | None]
) -> DeepenedStore:
    """Returns the state of a deepened network: parameters of new blocks are zero, their buffers those of a near one."""
    parameters = {name for name, _ in deep.architecture.outline.named_parameters(remove_duplicate=False)}
    shapes, own = deep.architecture.shapes, shallow.state
    held = {name: other for name, other in found.names.items() if other in own}
    zeros: dict[str, Tensor] = {}
    given: dict[str, Tensor] = {}
    for series in found.series:
        near: dict[object, str] = {}
        for path, kind in sorted(series.deep.items(), key=lambda pair: blocks[pair[0]] is None):
            # Blocks of the network itself come first, so that each new one finds one of its kind.
            template = near.setdefault(kind, blocks[path] or "")
            for rest, _ in kind:
                name, other = f"{path}{rest}", f"{blocks[path] or template}{rest}"
                is_own = blocks[path] is not None
                if name in parameters and not is_own:
                    zeros[name] = shapes[name]
                elif other in own:
                    held[name] = other
                elif not is_own and not template:
                    given[name] = deep.architecture.initial_state()[name]
    return DeepenedStore(own, held, zeros, given, list(shapes))


def _apart(shallow: SourceModel, model: SourceModel, batches: Sequence[tuple[object, ...]]) -> float:
    """Returns the largest difference between two networks' outputs: on inputs as given, and on random ones."""
    worst = 0.0
    for inputs in batches:
        generator = torch.Generator().manual_seed(0)
        drawn = tuple(
            torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value)
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for value in inputs
        )
        for each in (inputs, drawn):
            ours, theirs = (Runner(source, each).outputs(source.state) for source in (shallow, model))
            worst = max(worst, difference(ours, theirs))
    return worst


def _refused(shallow: SourceModel, deep: SourceModel, series: Series, apart: float) -> GraphMismatchError:
    """Returns the error for a network whose function blocks of zeros change."""
    path = next(iter(series.deep)).rpartition(".")[0]
    where = f"of '{path}' " if path else ""
    lacking = next(name for name in deep.architecture.shapes if name not in shallow.architecture.shapes)
    return GraphMismatchError(
        f"The depth differs: {shallow.name} has {len(series.shallow)} layers {where}and {deep.name} has "
        f"{len(series.deep)}. Zeros for what {shallow.name} lacks, such as '{lacking}' of {deep.name}, change what it "
        f"computes (by {apart:.2g} of the outputs' scale): these layers do not only add to a residual stream, but "
        "replace or normalise it. Such networks cannot be fused; give networks of one depth."
    )
