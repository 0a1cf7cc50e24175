"""Small pictures of couplings: a raster of the coupling matrix, as a PNG inside the page."""

from __future__ import annotations

import base64
import itertools
import struct
import zlib
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from mergekit_ot.fusion.alignment import FamilyCoupling, Pairs
from mergekit_ot.transport.coupling import Coupling

# Blue: arrives as it is; vermilion: arrives negated. Both stand out on white and on near-black, for colour-blind
# readers too; opacity tells how much mass there is, so that one picture serves the light and the dark theme.
_BLUE, _VERMILION = (31, 131, 196), (213, 94, 0)
_LEVELS = 15
_FAINTEST = 0.25
# Less than this share of the largest mass is left blank.
_VISIBLE = 0.01


def coupling_picture(coupling: Coupling | FamilyCoupling, cells: int) -> tuple[str, int, int]:
    """Returns a picture of a coupling matrix as a ``data:`` address, and its width and height in pixels.

    Rows are fused neurons, columns the source's. Opacity is the root of the mass, relative to the largest.

    Args:
        coupling: Of a group, or of a family: its members then stand at the places of their contexts.
        cells: Pixels along an axis at most; several neurons share a pixel where there are more.
    """
    signed = signed_matrix(coupling)
    # Neurons of both signs may share a pixel: it shows the mass of all, in the colour of most.
    mass, balance = _downsampled(signed.abs(), cells), _downsampled(signed, cells)
    largest = float(mass.max()) or 1.0
    level = (_LEVELS * (mass / largest).sqrt()).ceil().clamp(0, _LEVELS)
    level[mass < _VISIBLE * largest] = 0
    level[(balance < 0) & (level > 0)] += _LEVELS
    height, width = level.shape
    return "data:image/png;base64," + base64.b64encode(_png(level)).decode("ascii"), width, height


def signed_matrix(coupling: Coupling | FamilyCoupling) -> Float[Tensor, "m n"]:
    """Returns what each fused neuron (row) takes from each neuron of the source; negative where it arrives negated."""
    if isinstance(coupling, Coupling):
        return coupling.average_map(is_signed=True).detach().float().cpu()
    members = {pairs: signed_matrix(member) for pairs, member in coupling.members.items()}
    rows = _offsets({_side(pairs, 0): matrix.shape[0] for pairs, matrix in members.items()})
    columns = _offsets({_side(pairs, 1): matrix.shape[1] for pairs, matrix in members.items()})
    whole = torch.zeros(rows[()], columns[()])
    for pairs, matrix in members.items():
        top, left = (offsets[_side(pairs, side)] for side, offsets in ((0, rows), (1, columns)))
        whole[top : top + matrix.shape[0], left : left + matrix.shape[1]] = matrix
    return whole


def _side(pairs: Pairs, side: int) -> tuple[int, ...]:
    return tuple(pair[side] for pair in pairs)


def _offsets(sizes: Mapping[tuple[int, ...], int]) -> dict[tuple[int, ...], int]:
    """Returns where each member begins, and under the empty key where the last one ends."""
    offsets, place = {}, 0
    for key in sorted(sizes):
        offsets[key] = place
        place += sizes[key]
    return {**offsets, (): place}


def _downsampled(matrix: Float[Tensor, "m n"], cells: int) -> Float[Tensor, "height width"]:
    """Returns sums over squares of equal size, so that no pixel stands for more neurons than another."""
    for axis in (0, 1):
        size = matrix.shape[axis]
        step = -(-size // cells)
        places = torch.arange(size) // step
        shape = [*matrix.shape]
        shape[axis] = -(-size // step)
        matrix = torch.zeros(shape).index_add_(axis, places, matrix)
    return matrix


def _png(level: Float[Tensor, "height width"]) -> bytes:
    """Returns a PNG with a palette: transparent, then so many opacities of each colour."""
    height, width = level.shape
    colours = [(0, 0, 0), *[_BLUE] * _LEVELS, *[_VERMILION] * _LEVELS]
    opacity = [round(255 * (_FAINTEST + (1 - _FAINTEST) * step / _LEVELS)) for step in range(1, _LEVELS + 1)]
    # Each row begins with the number of its filter: 0, none.
    rows = torch.nn.functional.pad(level.to(torch.uint8), (1, 0)).numpy().tobytes()
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)),
        (b"PLTE", bytes(itertools.chain(*colours))),
        (b"tRNS", bytes([0, *opacity, *opacity])),
        (b"IDAT", zlib.compress(rows, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, content) for kind, content in chunks)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
