"""Rules of operations on places: interpolation, pixel and channel shuffle, windows, Fourier transforms."""

from __future__ import annotations

from mergekit_ot import EinRule, FunctionRule, Labels, NodeRule, OperationView

_PLACES = "position in space or time"


def _resized(spatial: int) -> NodeRule:
    """Interpolation: batch and channels pass, every place of the result is new."""

    def rule(operation: OperationView) -> list[Labels]:
        labels = operation.labels("self" if "self" in operation.arguments else "input")
        for label in labels[2:]:
            operation.algebra.pin(label, _PLACES)
        places = [operation.algebra.pinned(size, _PLACES) for size in operation.output_shapes[0][2:]]
        return [[*labels[:2], *places]]

    return FunctionRule(rule)


def _pixel_shuffle(operation: OperationView) -> list[Labels]:
    """``b.. (c r r) h w -> b.. c (h r) (w r)``: the offsets inside a pixel stay in order."""
    algebra = operation.algebra
    labels, factor = operation.labels("self"), operation.argument("upscale_factor")
    channels = operation.shape("self")[-3]
    factors = algebra.split_product(labels[-3], [channels // factor**2, factor**2])
    algebra.touch(labels[-3])
    if factors is None:
        algebra.pin(labels[-3], "shuffled across blocks")
        factors = [algebra.pinned(channels // factor**2, "shuffled across blocks")]
    else:
        algebra.pin(factors[1], "offset inside a pixel")
    for label in labels[-2:]:
        algebra.pin(label, _PLACES)
    places = [algebra.pinned(size, _PLACES) for size in operation.output_shapes[0][-2:]]
    return [[*labels[:-3], factors[0], *places]]


def _pixel_unshuffle(operation: OperationView) -> list[Labels]:
    algebra = operation.algebra
    labels, factor = operation.labels("self"), operation.argument("downscale_factor")
    for label in labels[-2:]:
        algebra.pin(label, _PLACES)
    channels = algebra.product([labels[-3], algebra.pinned(factor**2, "offset inside a pixel")])
    places = [algebra.pinned(size, _PLACES) for size in operation.output_shapes[0][-2:]]
    return [[*labels[:-3], channels, *places]]


def _channel_shuffle(operation: OperationView) -> list[Labels]:
    algebra = operation.algebra
    labels, groups = operation.labels("self"), operation.argument("groups")
    size = operation.shape("self")[1]
    factors = algebra.split_product(labels[1], [groups, size // groups])
    algebra.touch(labels[1])
    if factors is None:
        algebra.pin(labels[1], "shuffled across blocks")
        shuffled = algebra.pinned(size, "shuffled across blocks")
    else:
        shuffled = algebra.product(factors[::-1])
    return [[labels[0], shuffled, *labels[2:]]]


def _windows(operation: OperationView) -> list[Labels]:
    """``im2col``: ``b c h w -> b (c k) l``, the taps of a window stay in order."""
    algebra = operation.algebra
    labels = operation.labels("self")
    for label in labels[2:]:
        algebra.pin(label, _PLACES)
    rows, places = operation.output_shapes[0][1:]
    taps = algebra.pinned(rows // operation.shape("self")[1], "taps of a window")
    return [[labels[0], algebra.product([labels[1], taps]), algebra.pinned(places, _PLACES)]]


def _from_windows(operation: OperationView) -> list[Labels]:
    """``col2im``: ``b (c k) l -> b c h w``."""
    algebra = operation.algebra
    labels, (shape,) = operation.labels("self"), operation.output_shapes
    rank = len(shape)
    channels, columns = shape[-3], operation.shape("self")[-2]
    algebra.pin(labels[-1], _PLACES)
    factors = algebra.split_product(labels[-2], [channels, columns // channels])
    algebra.touch(labels[-2])
    if factors is None:
        algebra.pin(labels[-2], "taps of a window")
        factors = [algebra.pinned(channels, "taps of a window")]
    else:
        algebra.pin(factors[1], "taps of a window")
    places = [algebra.pinned(size, _PLACES) for size in shape[-2:]]
    return [[*labels[: rank - 3], factors[0], *places]]


def _spectrogram(operation: OperationView) -> list[Labels]:
    """Short Fourier transforms along the last axis, forward or back; the axes before it pass."""
    algebra = operation.algebra
    labels, (shape,) = operation.labels("self"), operation.output_shapes
    is_back = "istft" in operation.name
    count = len(labels) - (2 if is_back else 1)
    for label in (*labels[count:], *(operation.labels("window") if operation.argument("window") is not None else ())):
        algebra.pin(label, _PLACES)
    return [[*labels[:count], *[algebra.pinned(size, "frequencies and frames") for size in shape[count:]]]]


def _sampling_grid(operation: OperationView) -> list[Labels]:
    """A grid of places, made of matrices; only the batch passes."""
    batch, *rest = operation.labels("theta")
    for label in rest:
        operation.algebra.pin(label, _PLACES)
    return [[batch, *[operation.algebra.pinned(size, _PLACES) for size in operation.output_shapes[0][1:]]]]


def _unfold(operation: OperationView) -> list[Labels]:
    """Sliding windows along one axis, with their entries on a new last one."""
    labels = operation.labels("self")
    axis = operation.axes("self", "dimension")[0]
    operation.algebra.pin(labels[axis], _PLACES)
    shape = operation.output_shapes[0]
    labels[axis] = operation.algebra.pinned(shape[axis], _PLACES)
    return [[*labels, operation.algebra.pinned(shape[-1], _PLACES)]]


def _fourier(operation: OperationView) -> list[Labels]:
    """A Fourier transform mixes its axes in order; the others pass."""
    labels = operation.labels("self")
    kind = operation.name.split(".")[1].removeprefix("fft_")
    axes = operation.axes("self", "dim", {"1": [-1], "2": [-2, -1]}.get("1" if kind in _ONE else kind[-1]))
    for axis in axes:
        operation.algebra.pin(labels[axis], "Fourier transform along this axis")
    shape = operation.output_shapes[0]
    return [
        [operation.algebra.pinned(shape[i], "frequencies") if i in axes else label for i, label in enumerate(labels)]
    ]


_ONE = ("fft", "ifft", "rfft", "irfft", "hfft", "ihfft")
_TRANSFORMS = (*_ONE, *[f"{kind}{rank}" for kind in _ONE for rank in ("2", "n")], "fftshift", "ifftshift")

SPATIAL: dict[str, NodeRule] = {
    **{f"aten.upsample_{kind}": _resized(2) for kind in ("nearest2d", "bilinear2d", "bicubic2d", "nearest1d")},
    **{f"aten._upsample_{kind}": _resized(2) for kind in ("nearest_exact1d", "nearest_exact2d", "nearest_exact3d")},
    **{f"aten._upsample_{kind}_aa": _resized(2) for kind in ("bilinear2d", "bicubic2d")},
    **{f"aten.upsample_{kind}": _resized(3) for kind in ("linear1d", "nearest3d", "trilinear3d")},
    "aten.grid_sampler": EinRule("b c *!; b *! -> b c *!", ("input", "grid")),
    "aten.grid_sampler_3d": EinRule("b c *!; b *! -> b c *!", ("input", "grid")),
    "aten.affine_grid_generator": FunctionRule(_sampling_grid),
    "aten.col2im": FunctionRule(_from_windows),
    **{f"aten.{name}": FunctionRule(_spectrogram) for name in ("stft", "istft")},
    "aten.grid_sampler_2d": EinRule("b c *!; b *! -> b c *!", ("input", "grid")),
    **{f"aten.reflection_pad{n}d": EinRule("b c *! -> b c *!", ("self",)) for n in (1, 2, 3)},
    **{f"aten.replication_pad{n}d": EinRule("b c *! -> b c *!", ("self",)) for n in (1, 2, 3)},
    "aten.pixel_shuffle": FunctionRule(_pixel_shuffle),
    "aten.pixel_unshuffle": FunctionRule(_pixel_unshuffle),
    "aten.channel_shuffle": FunctionRule(_channel_shuffle),
    "aten.native_channel_shuffle": FunctionRule(_channel_shuffle),
    "aten.im2col": FunctionRule(_windows),
    "aten.unfold": FunctionRule(_unfold),
    **{f"aten.{kind}": FunctionRule(_fourier) for kind in ("_fft_c2c", "_fft_r2c", "_fft_c2r")},
    **{f"aten.fft_{kind}": FunctionRule(_fourier) for kind in _TRANSFORMS},
}
