"""Where norms stand in a chain: found by their numbers in a sequence, by their widths, or by their names."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from mergekit_ot import ArchitectureError
from mergeot_chains.layers import CONVOLUTION, Layer
from mergeot_chains.network import Flattening
from mergeot_chains.order import Place, are_closed, number_of

# A place between layers: behind so many of them, and whether behind a flattening there.
Where = tuple[int, bool]


def place_norms(
    weighted: Sequence[Layer],
    joints: Sequence[Flattening | None],
    norms: Sequence[Layer],
    places: Mapping[str, Place],
    file_order: Sequence[str] | None,
) -> dict[Where, list[Layer]]:
    """Returns the norms of each place between layers.

    Args:
        weighted: The layers with weights, in order.
        joints: What is between them.
        norms: The norms.
        places: Path → place of every layer.
        file_order: Paths of all layers in the order of the file; None where that order says nothing.

    Raises:
        ArchitectureError: A norm fits nowhere or at several places, or a recurrent layer stands there.
    """
    widths = _widths(weighted, joints)
    found: dict[Where, list[Layer]] = {}
    for norm in norms:
        fitting = [where for where, width in widths.items() if width == norm.outputs]
        if places[norm.path].index is None:
            fitting = [where for where in fitting if not _is_inside(where, weighted, places)]
        where = _narrowed(fitting, norm, weighted, dict(places), file_order)
        if where is None:
            raise ArchitectureError(
                f"Where the norm '{norm.path}' of {norm.outputs} numbers stands is not in the file: "
                f"{len(fitting)} places fit."
            )
        behind = weighted[where[0] - 1] if where[0] else weighted[0]
        if behind.kind not in ("linear layer", CONVOLUTION) or found.get(where):
            raise ArchitectureError(
                f"The norm '{norm.path}' stands behind '{behind.path}', and how is not in the file."
            )
        found.setdefault(where, []).append(norm)
    return found


def _is_inside(where: Where, weighted: Sequence[Layer], places: Mapping[str, Place]) -> bool:
    """Whether a place is between two layers of one sequence, where only what belongs to that can stand."""
    number = where[0]
    return 0 < number < len(weighted) and are_closed(weighted[number - 1], weighted[number], places)


def _widths(weighted: Sequence[Layer], joints: Sequence[Flattening | None]) -> dict[Where, int]:
    widths: dict[Where, int] = {(0, False): weighted[0].inputs}
    for number, layer in enumerate(weighted, start=1):
        widths[number, False] = layer.outputs
    for number, (joint, (_, other)) in enumerate(zip(joints, itertools.pairwise(weighted), strict=True), start=1):
        if joint is not None:
            widths[number, True] = other.inputs
    return widths


def _narrowed(
    fitting: Sequence[Where],
    norm: Layer,
    weighted: Sequence[Layer],
    places: dict[str, Place],
    file_order: Sequence[str] | None,
) -> Where | None:
    """Returns the one place of those where a norm fits, or None."""
    index = places[norm.path].index
    if index is not None:
        behind = _behind(norm, weighted, places)
        fitting = [where for where in fitting if where[0] == behind]
        # Where a flattening changes no width, the norm may as well stand before it.
        return fitting[0] if fitting else None
    distinct = list(dict.fromkeys(where[0] for where in fitting))
    if len(distinct) == 1:
        return fitting[0]
    if file_order is None:
        return None
    number = number_of(norm, places)
    named = [each for each in distinct if each and number and number_of(weighted[each - 1], places) == number]
    if len(named) == 1 and file_order.index(weighted[named[0] - 1].path) < file_order.index(norm.path):
        return next(where for where in fitting if where[0] == named[0])
    here = file_order.index(norm.path)
    neighbours = {
        each
        for each in distinct
        for at in [file_order.index(weighted[each - 1].path) if each else -1]
        if at == here - 1
    }
    is_alone = here + 1 == len(file_order) or file_order[here + 1] in {layer.path for layer in weighted}
    return next((where for where in fitting if where[0] in neighbours), None) if is_alone else None


def _behind(norm: Layer, weighted: Sequence[Layer], places: Mapping[str, Place]) -> int:
    """Returns behind how many layers a norm of a sequence stands."""
    own = places[norm.path]
    before = 0
    for number, layer in enumerate(weighted, start=1):
        place = places[layer.path]
        if place.parents == own.parents and place.index is not None and (place.index < (own.index or 0)):
            before = number
    if before:
        return before
    # The first of its sequence: behind all that stands before the sequence.
    inside = [number for number, layer in enumerate(weighted, start=1) if places[layer.path].parents == own.parents]
    return inside[0] - 1 if inside else -1
