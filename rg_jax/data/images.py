"""Pixel values → model input, and → 8-bit pictures for people.

    CT slice    clip at -1000 HU, then three windows as three channels (medgemma style)
    MR slice    min-max of the slice (or its percentiles), one channel repeated
    picture     (H, W, 3) uint8 of any modality: resized first, by antialiased bicubic on 8-bit RGB

Slices are normalised first and resized then: bilinear, half-pixel centres, no antialiasing, which
reads two neighbours per axis and output pixel. So only those pixels are normalised where that is
less work; the result is the same number by number, as every style works pixel by pixel.
"""

import dataclasses
import functools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped, UInt8
from PIL import Image

from rg_jax.data.augment import AugmentConfig, Crop, Draw, draw
from rg_jax.errors import UserError

STYLES = ("medgemma", "percentile", "min_max", "dataset_stats")

CT_MIN = -1000.0
CT_WINDOWS = ((2250.0, -100.0), (350.0, 40.0), (80.0, 40.0))  # (width, level) in HU
WINDOWS = {"wide": CT_WINDOWS[0], "soft": CT_WINDOWS[1], "brain": CT_WINDOWS[2]}
# Mean and standard deviation: CT and MR in raw units, pictures per data set on [0, 1].
DATASET_STATS = {
    "CT": (-610.1908535827807, 737.3882466073229),
    "MR": (141.1154960399739, 255.40429635138338),
    "slake": (0.2526479, 0.2969230),
    "vqa_rad": (0.3090255, 0.2935555),
}
# One bright pixel must not darken an MR slice: the share cut off at either end.
MR_PERCENTILES = (0.5, 99.5)

_EPS = 1e-5  # in the denominators of the published code: a constant slice becomes all minimum

# Real values (HU for CT) of stored pixels of any shape, in float32.
_Real = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class _Style:
    """What a style makes of one slice, pixel by pixel: an affine function of clipped real values.

    Channel c is (clip(real(pixel), lows[c], highs[c]) - zeros[c]) · scales[c] + plus. Whatever
    needs the whole slice (its extremes) is settled already.
    """

    real: _Real
    bent: bool  # `real` is a power, which takes much longer than the rest together
    lows: Sequence[float]
    highs: Sequence[float]
    zeros: Sequence[float]
    scales: Sequence[float]
    plus: float

    @property
    def channels(self) -> int:
        return len(self.lows)

    def clip(self, channel: int, real: np.ndarray, out: np.ndarray) -> np.ndarray:
        """The clipped values: `real` itself where its own extremes are the bounds, else `out`."""
        low, high = self.lows[channel], self.highs[channel]
        return real if low == -np.inf else np.clip(real, low, high, out=out)

    def scale(self, channel: int, values: np.ndarray, out: np.ndarray) -> None:
        """Clipped values, or what lies between two of them → what the model sees.

        `values` is written over; the last step goes to `out`.
        """
        values -= self.zeros[channel]
        values *= self.scales[channel]
        np.add(values, self.plus, out=out)


def prepare_image(
    record: dict[str, Any],
    size: int,
    style: str = "medgemma",
    augment: AugmentConfig | None = None,
    rng: np.random.Generator | None = None,
    drawn: Draw | None = None,
    out: Float[np.ndarray, "S S 3"] | None = None,
) -> tuple[Float[np.ndarray, "S S 3"], Crop]:
    """A decoded record's image as the model sees it, and the part of the source that it shows.

    float32 in [-1, 1] for styles "medgemma" and "percentile" (MR by percentiles, else the same),
    [0, 1] for "min_max", about [-2, 2] for "dataset_stats". `drawn` gives the random changes where
    the caller has drawn them already (to place the boxes first); otherwise they are drawn here.
    `out`: where to write it, say its place in a batch.
    Raises UserError naming the record for an image it cannot treat.
    """
    image = record["image"]
    height, width = image.shape[:2]
    if drawn is None:
        drawn = draw(augment, width, height, rng)
    try:
        if image.shape[2] == 3:
            dataset = record["source"]["dataset"]
            picture = picture_to_input(image, size, style, drawn, dataset)
            if out is None:
                out = picture
            else:
                out[...] = picture
        else:
            slope, intercept = record["rescale"]
            out = slice_to_input(
                image[..., 0], size, record["modality"], style, drawn, (slope, intercept), out
            )
    except ValueError as error:
        raise UserError(f"record {record['id']}: {error}") from None
    return out, drawn.crop


def slice_to_input(
    raw: Shaped[np.ndarray, "H W"],
    size: int,
    modality: str,
    style: str = "medgemma",
    drawn: Draw | None = None,
    rescale: tuple[float, float] = (1.0, 0.0),
    out: Float[np.ndarray, "S S 3"] | None = None,
) -> Float[np.ndarray, "S S 3"]:
    """A slice as stored (value · slope + intercept = HU for CT) → model input, float32.

    A modality other than CT and MR has no windows and no figures of its own: min-max of the slice,
    the limits of CT for "min_max", the figures of MR for "dataset_stats", as published.
    """
    part = raw if drawn is None else drawn.crop.cut(raw)
    if out is None:
        out = np.empty((size, size, 3), np.float32)
    _resize(part, size, _style(part, modality, style, drawn, rescale), out)
    return out


def normalise_slice(
    raw: Shaped[np.ndarray, "H W"], modality: str, style: str = "medgemma"
) -> Float[np.ndarray, "C H W"]:
    """The normalised slice before the resize, in real values: 3 channels for windowed CT, else 1.

    Constant slices become all -1 (medgemma) or 0 (min_max).
    """
    chosen = _style(raw, modality, style, None, (1.0, 0.0))
    real = chosen.real(raw)
    out = np.empty((chosen.channels, *raw.shape), np.float32)
    for channel, plane in enumerate(out):
        plane[...] = chosen.clip(channel, real, plane)
        chosen.scale(channel, plane, plane)
    return out


def _style(
    part: np.ndarray,
    modality: str,
    style: str,
    drawn: Draw | None,
    rescale: tuple[float, float],
) -> _Style:
    if style not in STYLES:
        raise ValueError(f"image style {style!r} is not one of {', '.join(STYLES)}")
    slope, intercept = (np.float32(value) for value in rescale)

    def scanned(values: np.ndarray) -> np.ndarray:
        real = (
            _room("real", values.shape) if values.ndim == 2 else np.empty(values.shape, np.float32)
        )
        real[...] = values
        if slope != 1:
            real *= slope
        if intercept != 0:
            real += intercept
        return real

    def floored(values: np.ndarray) -> np.ndarray:
        real = scanned(values)
        # `clip` for a lower bound only: NumPy's `maximum` of a constant takes three times as long.
        return np.clip(real, CT_MIN, np.inf, out=real) if modality == "CT" else real

    def extremes() -> tuple[float, float]:
        # A negative slope turns the order round, so both are taken before sorting them.
        low, high = np.sort(floored(np.array([part.min(), part.max()])))
        return float(low), float(high)

    bent = drawn is not None and drawn.gamma != 1.0
    changes = bent or (drawn is not None and drawn.shift != 0.0)
    # A curve runs between the extremes; whatever else does not need them is spared the look.
    change = _augment(drawn, *(extremes() if bent else (0.0, 0.0)))
    # Where nothing is changed the floor of CT needs no pass of its own: clipping is enough.
    floor = CT_MIN if modality == "CT" and not changes else -np.inf

    def real(values: np.ndarray) -> np.ndarray:
        return change(floored(values)) if changes else scanned(values)

    def changed(values: tuple[float, float]) -> tuple[float, float]:
        low, high = change(np.array(values, np.float32))
        return float(low), float(high)

    def one(low: float, high: float, zero: float, scale: float, plus: float = 0.0) -> _Style:
        return _Style(real, bent, (low,), (high,), (zero,), (scale,), plus)

    if style == "min_max":
        limits = (0.0, 4096.0) if modality == "MR" else (CT_MIN, 3000.0)
        low, high = (float(value) for value in np.clip(changed(extremes()), *limits))
        return one(*limits, low, 1 / (high - low + _EPS))
    if style == "dataset_stats":
        mean, std = DATASET_STATS["CT" if modality == "CT" else "MR"]
        std += 1e-8
        return one(max(mean - 2 * std, floor), mean + 2 * std, mean, 1 / std)
    if modality == "CT":
        only = -1 if drawn is None else drawn.window
        windows = CT_WINDOWS if only < 0 else (CT_WINDOWS[only],)
        lows = [level - width / 2 for width, level in windows]
        highs = [level + width / 2 for width, level in windows]
        scales = [2 / (width + _EPS) for width, _ in windows]
        return _Style(real, bent, [max(low, floor) for low in lows], highs, lows, scales, -1.0)
    low, high = changed(extremes())
    if style == "percentile" and modality == "MR":
        cut = np.percentile(part, MR_PERCENTILES).astype(np.float32)
        inner = [float(value) for value in np.sort(real(cut))]
        if inner[0] < inner[1]:  # else nearly all pixels are equal, and the extremes say more
            low, high = inner
            return one(low, high, low, 2 / (high - low + _EPS), -1.0)
    # Nothing lies beyond the extremes, but for the rounding of a power.
    bounds = (low, high) if changes else (-np.inf, np.inf)
    return one(*bounds, low, 2 / (high - low + _EPS), -1.0)


def _augment(drawn: Draw | None, low: float, high: float) -> _Real:
    """Contrast and brightness in raw units; `low` and `high` are the slice's extremes."""
    gamma, shift = (1.0, 0.0) if drawn is None else (drawn.gamma, drawn.shift)
    if gamma == 1.0 and shift == 0.0:
        return lambda values: values
    span = high - low

    def change(values: np.ndarray) -> np.ndarray:
        if gamma != 1.0:
            values = ((values - low) / (span + 1e-7)) ** np.float32(gamma) * span + low
        return values + np.float32(shift)

    return change


def _resize(
    part: Shaped[np.ndarray, "H W"], size: int, style: _Style, out: Float[np.ndarray, "S S 3"]
) -> None:
    """The style of the pixels, then bilinear to (size, size), one channel repeated to three.

    Only clipping has to come before the resize: what is affine is the same, and less work, after.
    """
    rows = _neighbours(part.shape[0], size)
    columns = _neighbours(part.shape[1], size)
    fewer = 4 * size * size < part.size
    if fewer:
        # Whole rows first: they are copied as they lie. "clip" looks at no index twice.
        part = part.take(np.concatenate(rows[:2]), 0, mode="clip")
        part = part.take(np.concatenate(columns[:2]), 1, mode="clip")
    real = _looked_up(part, style.real) if style.bent else style.real(part)
    values = _room("values", part.shape)
    lines = _room("lines", (size, part.shape[1]))
    plane = _room("plane", (size, size))
    for channel in range(style.channels):
        clipped = style.clip(channel, real, values)
        if fewer:
            _between(clipped[:size], clipped[size:], rows[2][:, None], lines)
            left, right = lines[:, :size], lines[:, size:]
        else:
            _between(clipped.take(rows[0], 0), clipped.take(rows[1], 0), rows[2][:, None], lines)
            left, right = lines.take(columns[0], 1), lines.take(columns[1], 1)
        _between(left, right, columns[2], plane)
        if style.channels == 3:
            style.scale(channel, plane, out[:, :, channel])
        else:
            style.scale(channel, plane, plane)
            # One at a time: spreading one plane over three takes NumPy four times as long.
            for place in range(3):
                out[:, :, place] = plane


def _looked_up(part: np.ndarray, real: _Real) -> np.ndarray:
    """Real values of the pixels, looked up where there are far fewer values than pixels.

    A scanner's slice has a few thousand different values and many times as many pixels.
    """
    if part.dtype.kind in "iu":
        low, high = int(part.min()), int(part.max())
        if high - low < part.size // 2:
            table = real(np.arange(low, high + 1))
            index = np.subtract(part, low, out=_room("index", part.shape, np.intp), dtype=np.intp)
            # "clip" only because it needs no copy in between: no index is outside.
            return table.take(index, out=_room("looked_up", part.shape), mode="clip")
    return real(part)


_rooms = threading.local()


def _room(name: str, shape: tuple[int, ...], dtype=np.float32) -> np.ndarray:
    """Memory of this thread that the next image uses again.

    Fresh memory comes from the system page by page, which takes longer than what is done in it.
    """
    known = getattr(_rooms, name, None)
    if known is None or known.shape != shape or known.dtype != dtype:
        known = np.empty(shape, dtype)
        setattr(_rooms, name, known)
    return known


def _between(first: np.ndarray, second: np.ndarray, share: np.ndarray, out: np.ndarray) -> None:
    """first + (second - first) · share."""
    np.subtract(second, first, out=out)
    out *= share
    out += first


@functools.lru_cache(maxsize=512)
def _neighbours(length: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per output pixel the two source pixels along one axis and the share of the second."""
    centre = np.clip((np.arange(size) + 0.5) * (length / size) - 0.5, 0, length - 1)
    first = np.floor(centre).astype(np.intp)
    second = np.minimum(first + 1, length - 1)
    return first, second, (centre - first).astype(np.float32)


def resize_classes(
    segmentation: UInt8[np.ndarray, "H W"], size: int
) -> UInt8[np.ndarray, "size size"]:
    """A class map at (size, size): every pixel takes the class at its own centre (nearest)."""
    rows, columns = (
        ((np.arange(size) + 0.5) * (length / size)).astype(np.intp) for length in segmentation.shape
    )
    return segmentation[rows[:, None], columns]


def picture_to_input(
    picture: UInt8[np.ndarray, "H W 3"],
    size: int,
    style: str = "medgemma",
    drawn: Draw | None = None,
    dataset: str = "",
) -> Float[np.ndarray, "S S 3"]:
    """An ordinary 8-bit RGB picture → model input, float32.

    Resized first (antialiased bicubic), then /255, then min-max over all three channels, or the
    figures of its data set for "dataset_stats" (not clipped).
    """
    if style not in STYLES:
        raise ValueError(f"image style {style!r} is not one of {', '.join(STYLES)}")
    part = picture if drawn is None else np.ascontiguousarray(drawn.crop.cut(picture))
    resized = Image.fromarray(part).resize((size, size), Image.Resampling.BICUBIC)
    values = np.asarray(resized, np.float32) * np.float32(1 / 255)
    if drawn is not None and drawn.gamma != 1.0:
        low, high = float(values.min()), float(values.max())
        gamma = Draw(drawn.crop, gamma=drawn.gamma)
        values = _augment(gamma, low, high)(values)
    shift = 0.0 if drawn is None else drawn.picture_shift
    if style == "dataset_stats":
        if dataset not in DATASET_STATS:
            raise ValueError(
                f"image style dataset_stats has no mean and deviation for data set {dataset!r};"
                " use medgemma or min_max"
            )
        mean, std = DATASET_STATS[dataset]
        return ((values - mean) / (std + 1e-8) + shift).astype(np.float32)
    low, high = float(values.min()), float(values.max())
    unit = (values - np.float32(low)) * np.float32(1 / (high - low + _EPS))
    if style == "min_max":
        return unit if shift == 0.0 else np.clip(unit + np.float32(shift), 0, 1)
    out = unit * 2 - 1
    return out if shift == 0.0 else np.clip(out + np.float32(shift), -1, 1)


def display_image(record: dict[str, Any], window: str = "soft") -> UInt8[np.ndarray, "H W 3"]:
    """The source image at its own size for people's eyes: 8-bit RGB.

    CT through `window` ("soft", "wide", "brain"), other slices between their percentiles, pictures
    as they are. Raises UserError for an unknown window.
    """
    image = record["image"]
    low, high = display_range(record, window)
    if image.shape[2] == 3:
        return image.copy()  # a record's own pixels are read-only
    grey = np.clip((_real(record) - low) * (255 / max(high - low, _EPS)), 0, 255)
    return np.repeat(np.round(grey).astype(np.uint8)[..., None], 3, axis=2)


def display_range(record: dict[str, Any], window: str = "soft") -> tuple[float, float]:
    """The real values (HU for CT) that `display_image` shows as black and as white."""
    if record["image"].shape[2] == 3:
        return 0.0, 255.0
    if record["modality"] == "CT":
        if window not in WINDOWS:
            raise UserError(f"CT window {window!r} is not one of {', '.join(WINDOWS)}")
        width, level = WINDOWS[window]
        return level - width / 2, level + width / 2
    low, high = np.percentile(_real(record), MR_PERCENTILES)
    return float(low), float(high)


def _real(record: dict[str, Any]) -> Float[np.ndarray, "H W"]:
    slope, intercept = record["rescale"]
    return record["image"][..., 0].astype(np.float32) * np.float32(slope) + np.float32(intercept)
