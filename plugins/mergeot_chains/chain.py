"""The guess: layers that fit one behind the other are a chain, where nothing else can have their names and shapes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_ot import ArchitectureError, Guess
from mergekit_ot.errors import unknown_name
from mergeot_chains.layers import CONVOLUTION, COUNTER, EMBEDDING, LINEAR, NORM, RECURRENT, Layer, Shapes, read_layers
from mergeot_chains.network import ACTIVATIONS, Activation, Chain, Flattening, LastStep, Stage
from mergeot_chains.norms import place_norms
from mergeot_chains.order import (
    Place,
    are_closed,
    by_names,
    check_ascending,
    check_names,
    names_a_beginning,
    places_of,
)
from mergeot_chains.words import sentence_of

# Fewer places than that may be several poolings side by side, and not the places of an image or a signal.
_LEAST_PLACES = 5
_OPTIONS = {"activation": tuple(ACTIVATIONS), "first": (EMBEDDING, "linear"), "steps": ("all", "last")}


def chain(shapes: Shapes, *, is_confirmed: bool, arguments: Mapping[str, Any]) -> Guess:
    """Returns the chain that a file holds.

    Args:
        shapes: Name → shape of its tensors, in its order.
        is_confirmed: Whether the user says that it is a plain chain. Otherwise it is one only where its names and
            shapes leave room for nothing else: a shortcut, a branch, a second network.
        arguments: What the user says besides: the ``activation`` between the layers, whether the ``first`` is an
            embedding, and which ``steps`` of a recurrent layer are read.

    Raises:
        ArchitectureError: It is none, or may be something else.

    Example:
        >>> shapes = {"0.weight": (8, 4), "0.bias": (8,), "2.weight": (8, 8), "2.bias": (8,), "4.weight": (2, 8)}
        >>> chain(shapes, is_confirmed=False, arguments={}).sentence
        'a chain of 3 linear layers 4-8-8-2, ReLU between them'
        >>> named = {name.replace("2.", "1.").replace("4.", "2."): shape for name, shape in shapes.items()}
        >>> chain(named, is_confirmed=False, arguments={})
        Traceback (most recent call last):
        ...
        mergekit_ot.errors.ArchitectureError: ... both have 8 numbers, so that a shortcut could join them...
    """
    _check_arguments(arguments)
    layers = read_layers(shapes)
    places, norms = places_of(layers), [layer for layer in layers if layer.kind == NORM]
    weighted = [layer for layer in layers if layer.kind != NORM]
    if len(weighted) < 2:
        raise ArchitectureError(f"It has {len(weighted)} layer(s) with weights, and a chain has two or more.")
    if not is_confirmed:
        check_names(weighted, places, norms)
    # Some formats sort names, and then their order says nothing.
    named = [name for name in shapes if not name.endswith(COUNTER)]
    is_sorted = named == sorted(named)
    weighted = by_names(weighted, places) if is_sorted else weighted
    weighted = _with_embedding(weighted, places, arguments.get("first"), is_confirmed=is_confirmed)
    joints = [_joint(one, other, is_confirmed=is_confirmed) for one, other in itertools.pairwise(weighted)]
    check_ascending(weighted, places)
    if not is_confirmed:
        _check_directions(weighted)
        _check_nothing_hides(weighted, joints, places)
    standing = place_norms(weighted, joints, norms, places, None if is_sorted else [each.path for each in layers])
    stages = _stages(weighted, joints, standing, arguments)
    sentence = sentence_of(weighted, joints, norms, arguments.get("activation", "relu"))
    return Guess(Chain, {"stages": stages}, sentence, _unknown(weighted, norms, arguments))


def _check_arguments(arguments: Mapping[str, Any]) -> None:
    for name, value in arguments.items():
        if name not in _OPTIONS:
            raise ArchitectureError(unknown_name("argument of 'chain'", name, _OPTIONS))
        said = "none" if value is None else str(value)
        if said not in _OPTIONS[name]:
            raise ArchitectureError(unknown_name(f"{name} of 'chain'", said, _OPTIONS[name]))


def _with_embedding(
    weighted: list[Layer], places: Mapping[str, Place], first: object, *, is_confirmed: bool
) -> list[Layer]:
    """Returns the layers with the first one as an embedding, where it is one.

    Only a name, or a recurrent layer behind, tells an embedding from a head that reads what the second layer reads too.

    Raises:
        ArchitectureError: It may be either.
    """
    layer, following = weighted[:2]
    is_named = "emb" in layer.path.lower()
    is_read_by_steps = following.is_recurrent and (is_confirmed or names_a_beginning(places[layer.path]))
    if layer.kind != LINEAR or layer.has_bias or following.kind == CONVOLUTION:
        return weighted
    embedding = dataclasses.replace(layer, kind=EMBEDDING, inputs=layer.outputs, outputs=layer.inputs, has_bias=False)
    can_be = {"linear": layer.outputs == following.inputs, EMBEDDING: layer.inputs == following.inputs}
    if first is None and all(can_be.values()) and not is_named:
        raise ArchitectureError(
            f"'{layer.path}' has as many rows as columns and no bias: it may be an embedding or a linear layer. Say "
            "so: --arch 'chain?first=embedding' or --arch 'chain?first=linear'."
        )
    may_be = can_be[EMBEDDING] and (is_named or is_read_by_steps)
    chosen = first or (EMBEDDING if may_be else "linear")
    return [embedding, *weighted[1:]] if chosen == EMBEDDING else weighted


def _joint(one: Layer, other: Layer, *, is_confirmed: bool) -> Flattening | None:
    """Returns what stands between two layers: nothing, or a flattening.

    Raises:
        ArchitectureError: They do not fit.
    """
    if one.kind == CONVOLUTION and other.kind == LINEAR:
        return _flattening(one, other, is_confirmed=is_confirmed)
    is_spatial = CONVOLUTION in (one.kind, other.kind)
    if is_spatial and (one.kind != other.kind or len(one.kernel) != len(other.kernel)):
        raise ArchitectureError(
            f"How '{other.path}' (a {other.kind}) reads '{one.path}' (a {one.kind}) is not in the file."
        )
    if one.outputs == other.inputs:
        return None
    hint = ""
    if is_spatial and one.outputs % other.inputs == 0:
        hint = " (a convolution in groups, or one that is transposed?)"
    raise ArchitectureError(
        f"'{other.path}' reads {other.inputs} numbers, and '{one.path}' before it gives {one.outputs}{hint}: one does "
        "not follow the other."
    )


def _flattening(one: Layer, other: Layer, *, is_confirmed: bool) -> Flattening:
    axes, places = len(one.kernel), other.inputs // one.outputs
    side = math.isqrt(places) if axes == 2 else places
    if other.inputs % one.outputs or places != side ** min(axes, 2):
        raise ArchitectureError(
            f"'{other.path}' reads {other.inputs} numbers, which are no square image of the {one.outputs} channels of "
            f"'{one.path}'."
        )
    if axes != 2 and 1 < places < _LEAST_PLACES and not is_confirmed:
        raise ArchitectureError(
            f"'{other.path}' reads {places} numbers of each channel of '{one.path}': they are places of a signal, or "
            "poolings side by side."
        )
    return Flattening((side, side) if axes == 2 else (places,) + (1,) * (axes - 1))


def _check_directions(weighted: Sequence[Layer]) -> None:
    """Checks that no convolution may be a transposed one, whose weight has its inputs first.

    Raises:
        ArchitectureError: One may be: it has as many inputs as outputs, and it would shrink to an even size, or nothing
            but convolutions follows, as in what makes images.
    """
    for layer in weighted:
        is_square = layer.kind == CONVOLUTION and layer.inputs == layer.outputs > 1
        if is_square and (weighted[-1].kind == CONVOLUTION or any(size % 2 == 0 for size in layer.kernel)):
            raise ArchitectureError(
                f"'{layer.path}' has as many inputs as outputs: it may be a convolution or a transposed one. If it is "
                "a plain chain of layers in order and none is transposed, say so: --arch chain."
            )


@dataclasses.dataclass(frozen=True)
class _Value:
    """What a layer gives, where something besides the next layer could read it."""

    name: str
    width: int
    is_spatial: bool = False
    is_end: bool = False

    def may_join(self, other: _Value, *, is_pooled: bool) -> bool:
        """Whether the two could be added: channels with places and a row of numbers only where places are pooled."""
        # The inputs and outputs of the whole keep their order in any case.
        is_harmless = self.is_end and other.is_end
        return self.width == other.width and not is_harmless and (is_pooled or self.is_spatial == other.is_spatial)


def _check_nothing_hides(
    weighted: Sequence[Layer], joints: Sequence[Flattening | None], places: dict[str, Place]
) -> None:
    """Checks that no two values that something else could read have the same width.

    Layers of one `nn.Sequential` are read by the next one only. What all others give could be read elsewhere too, added
    to what another layer gives, or not be what the next layer reads. Each of these needs two values of one width.

    Raises:
        ArchitectureError: There are two.
    """
    flattened = [math.prod(joint.places) for joint in joints if joint is not None]
    values = _values(weighted, joints, places)
    for one, other in itertools.combinations(values, 2):
        if one.may_join(other, is_pooled=1 in flattened):
            raise ArchitectureError(
                f"{one.name[0].upper()}{one.name[1:]} and {other.name} both have {one.width} numbers, so that a "
                "shortcut could join them, which no file shows. If it is a plain chain of its layers in order, say so: "
                "--arch chain."
            )


def _values(weighted: Sequence[Layer], joints: Sequence[Flattening | None], places: dict[str, Place]) -> list[_Value]:
    first, last = weighted[0], weighted[-1]
    values = [] if first.kind == EMBEDDING else [_Value("its input", first.inputs, _is_spatial(first), True)]
    for joint, (one, other) in zip(joints, itertools.pairwise(weighted), strict=True):
        if are_closed(one, other, places):
            continue
        values.append(_Value(f"'{one.path}'", one.outputs, _is_spatial(one)))
        if joint is not None and math.prod(joint.places) > 1:
            values.append(_Value(f"'{one.path}', flattened,", other.inputs))
    return [*values, _Value(f"'{last.path}'", last.outputs, _is_spatial(last), True)]


def _is_spatial(layer: Layer) -> bool:
    return layer.kind == CONVOLUTION


def _stages(
    weighted: Sequence[Layer],
    joints: Sequence[Flattening | None],
    standing: Mapping[tuple[int, bool], Sequence[Layer]],
    arguments: Mapping[str, Any],
) -> tuple[Stage, ...]:
    said = arguments.get("activation", "relu")
    activation = Activation("none" if said is None else str(said))
    # Where nobody says what follows, nothing is left that only the absence of an activation would allow, such as signs.
    kinds = (
        (LINEAR, CONVOLUTION) if "activation" in arguments else (LINEAR, CONVOLUTION, EMBEDDING, *RECURRENT.values())
    )
    stages: list[Stage] = [*standing.get((0, False), ())]
    for number, layer in enumerate(weighted, start=1):
        stages += [layer, *standing.get((number, False), ())]
        if layer.is_recurrent and arguments.get("steps") == "last" and not _reads_steps(weighted[number:]):
            stages.append(LastStep())
        if number == len(weighted):
            break
        if layer.kind in kinds:
            stages.append(activation)
        joint = joints[number - 1]
        stages += [] if joint is None else [joint]
        stages += standing.get((number, True), ())
    return tuple(stages)


def _reads_steps(following: Sequence[Layer]) -> bool:
    return any(layer.is_recurrent for layer in following)


def _unknown(weighted: Sequence[Layer], norms: Sequence[Layer], arguments: Mapping[str, Any]) -> str:
    """Returns what of the function is neither in the file nor said by the user."""
    unknown = []
    if "activation" not in arguments:
        unknown.append("the activation between the layers")
    if any(layer.kind == CONVOLUTION for layer in weighted):
        unknown.append("strides, padding and poolings")
    if any(layer.is_recurrent for layer in weighted) and "steps" not in arguments:
        unknown.append("which steps of the recurrent layer are read")
    if norms:
        unknown.append("whether an activation stands before or behind a norm")
    return ", ".join(unknown)
