"""Drawn CT and MR slices: a seed in, a slice with its segmentation out. NumPy only.

Schematic on purpose, but honest: what stands in the segmentation is what can be seen, every organ
is told by its look (brightness, texture, shape) and not by its place, and place varies so much that
nobody does well by guessing it. Only the two kidneys look alike; they are told apart by the side of
the spine they lie on. Pictures are in radiological convention: the patient's right is at the left
of the image.

Lengths are shares of the image side, so that a slice looks alike at 64 and at 512 pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Bool, Float, Int16, UInt8

from tfds_builders.phantom.organs import (
    BY_CLASS_ID,
    DEFAULT_ORGANS,
    KINDS,
    PROBES,
    SCALES,
    SIZE_MARGIN,
    Look,
    OrganKind,
    area_threshold,
    outline,
)

FIELD_OF_VIEW_MM = 400.0
MODALITIES = ("CT", "MR")
SPLIT_CODES = {"train": 0, "val": 1, "test": 2}

_TRIES = 60
_MIRRORED = 0.05  # share of organs whose home is mirrored, where they belong to no side


@dataclass(frozen=True)
class Organ:
    """One organ as it can be seen. `box` (x_min, y_min, x_max, y_max) in pixels, max exclusive."""

    name: str
    class_id: int
    box: tuple[int, int, int, int]
    area: int  # pixels
    size: str  # "small" or "large"
    side: str  # of the patient: "left", "right", or "" where the centre is close to the middle


@dataclass(frozen=True)
class Slice:
    """A drawn slice. value = image * slope + intercept (HU for CT, arbitrary units for MR)."""

    image: Int16[np.ndarray, "H W 1"]
    rescale: tuple[float, float]
    modality: str
    spacing_mm: tuple[float, float]
    segmentation: UInt8[np.ndarray, "H W"]
    drawn: dict[str, str]  # organ name -> size, as it was meant; a reader must find the same


def draw_slice(
    seed: Sequence[int],
    image_size: int = 64,
    modality: str = "CT",
    organs: Sequence[str] = DEFAULT_ORGANS,
    presence: float = 0.6,
) -> Slice:
    """Draw one slice; the same arguments always give the same slice.

    `seed`: whole numbers, e.g. (seed, split, index). `presence`: chance that an organ is meant to
    be there; one that finds no free place is left out, so a little fewer are seen. Raises
    ValueError for an unknown organ or modality or a side of fewer than 32 pixels.
    """
    if modality not in MODALITIES:
        raise ValueError(f"modality {modality!r} is not one of {', '.join(MODALITIES)}")
    unknown = [name for name in organs if name not in KINDS]
    if unknown:
        raise ValueError(f"unknown organ {unknown[0]!r}; known are {', '.join(KINDS)}")
    if image_size < 32:
        raise ValueError(f"image_size {image_size} is below 32: organs would be a few pixels wide")
    rng = np.random.default_rng([*seed, MODALITIES.index(modality)])
    body = _Body(rng, image_size)
    picture = body.paint(rng, modality)
    segmentation = np.zeros((image_size, image_size), np.uint8)
    free = body.interior & ~body.spine_zone
    drawn: dict[str, str] = {}
    # Drawn for every organ, used or not: what is there must not change what the others look like.
    wanted = [name for name in organs if rng.random() < presence]
    # Large ones first, then the kidneys, which have only one side to go to: the others still find
    # a place between them.
    wanted.sort(key=lambda name: (name != "liver", not KINDS[name].side, -area_threshold(name)))
    for name in wanted:
        kind = KINDS[name]
        size = "large" if rng.random() < 0.5 else "small"
        placed = _place(rng, kind, size, body, free)
        if placed is None:
            continue
        window, mask, around, u, v = placed
        look = kind.ct if modality == "CT" else kind.mr
        picture[window][mask] = _texture(rng, kind, look, modality, u, v)[mask]
        segmentation[window][mask] = kind.class_id
        free[window] &= ~around  # a gap to the neighbours keeps every outline visible
        drawn[name] = size
    stored, rescale = _acquire(rng, picture, modality, body)
    spacing = FIELD_OF_VIEW_MM / image_size
    return Slice(stored[..., None], rescale, modality, (spacing, spacing), segmentation, drawn)


def read_slice(segmentation: UInt8[np.ndarray, "H W"]) -> list[Organ]:
    """The perfect reader: every organ in a segmentation, in the order of `KINDS`.

    Uses the segmentation alone. Raises ValueError for a class that the phantom does not draw.
    """
    found = []
    height, width = segmentation.shape
    for class_id in np.unique(segmentation[segmentation > 0]):
        if int(class_id) not in BY_CLASS_ID:
            raise ValueError(f"class {class_id} is none of the phantom's")
        kind = BY_CLASS_ID[int(class_id)]
        rows, columns = np.nonzero(segmentation == class_id)
        x_min, x_max = int(columns.min()), int(columns.max()) + 1
        box = (x_min, int(rows.min()), x_max, int(rows.max()) + 1)
        share = rows.size / (height * width)
        size = "large" if share > area_threshold(kind.name) else "small"
        offset = (x_min + x_max) / 2 / width - 0.5
        side = "" if abs(offset) < 0.1 else ("right" if offset < 0 else "left")
        found.append(Organ(kind.name, kind.class_id, box, rows.size, size, side))
    order = list(KINDS)
    return sorted(found, key=lambda organ: order.index(organ.name))


class _Body:
    """The trunk: a fat ring, a muscle ring with ribs, and a spine; organs lie in the interior."""

    def __init__(self, rng: np.random.Generator, size: int):
        self.size = size
        self.x, self.y = _grid(size)
        self.centre = (0.5 + rng.uniform(-0.015, 0.015), 0.475 + rng.uniform(-0.015, 0.015))
        self.half = (rng.uniform(0.445, 0.475), rng.uniform(0.385, 0.425))
        fat, muscle = rng.uniform(0.02, 0.045), rng.uniform(0.025, 0.035)
        radius = np.hypot(
            (self.x - self.centre[0]) / self.half[0], (self.y - self.centre[1]) / self.half[1]
        )
        mean_half = sum(self.half) / 2
        self.skin = radius <= 1
        self.wall = radius <= 1 - fat / mean_half
        inner = 1 - (fat + muscle) / mean_half
        self.interior = radius <= inner
        self.inner_half = (self.half[0] * inner, self.half[1] * inner)
        self.wall_half = tuple(half * (1 - (fat + muscle / 2) / mean_half) for half in self.half)
        self.spine = (
            self.centre[0] + rng.uniform(-0.01, 0.01),
            self.centre[1] + self.half[1] * 0.62,
        )
        self.back = self.y > self.spine[1] + 0.02  # muscles and spinous process
        self.spine_zone = self.back.copy()
        self._stamp(self.spine_zone, True, *self.spine, 0.085, 0.075, self.skin)

    def _stamp(self, picture, value, x: float, y: float, a: float, b: float, within) -> None:
        """Fill the ellipse around (x, y) where `within` allows it."""
        window = _window(x, y, a, b, self.size)
        inside = ((self.x[window] - x) / a) ** 2 + ((self.y[window] - y) / b) ** 2 <= 1
        picture[window][inside & within[window]] = value

    def paint(self, rng: np.random.Generator, modality: str) -> Float[np.ndarray, "H W"]:
        ct = modality == "CT"
        air, fat, muscle, marrow, cortex, canal = (
            (-1000, -95, 48, 230, 560, 18) if ct else (0.0, 0.66, 0.14, 0.50, 0.02, 0.9)
        )
        picture = np.full((self.size, self.size), air, np.float64)
        if ct:
            arc = 0.945 - 0.16 * (self.x - 0.5) ** 2
            table = (np.abs(self.y - arc) < 0.012) & (np.abs(self.x - 0.5) < 0.40)
            picture[table] = -150
        picture[self.skin] = fat
        picture[self.wall] = muscle
        picture[self.interior] = fat - (12 if ct else 0.04)
        picture[self.interior & self.back] = muscle
        wall = self.wall & ~self.interior
        for angle in rng.uniform(0, np.pi, 3):
            for mirrored in (angle, np.pi - angle):
                rib_x = self.centre[0] + self.wall_half[0] * np.cos(mirrored)
                rib_y = self.centre[1] - self.wall_half[1] * np.sin(mirrored) * 0.9
                self._stamp(picture, cortex, rib_x, rib_y, 0.016, 0.016, wall)
        x, y = self.spine
        self._stamp(picture, cortex, x, y + 0.105, 0.014, 0.045, self.wall)
        self._stamp(picture, cortex, x, y + 0.070, 0.050, 0.018, self.wall)
        self._stamp(picture, cortex, x, y, 0.074, 0.058, self.wall)
        self._stamp(picture, marrow, x, y - 0.002, 0.058, 0.043, self.wall)
        self._stamp(picture, canal, x, y + 0.064, 0.024, 0.019, self.wall)
        return picture


def _place(rng, kind: OrganKind, size: str, body: _Body, free: Bool[np.ndarray, "H W"]):
    """A free place for an organ: (window, mask, mask with a gap around, u, v), or None.

    u and v are the organ's own axes inside the window, 1 at its outline.
    """
    scale, stretch = rng.uniform(*SCALES[size]), np.exp(rng.uniform(-0.18, 0.18))
    a, b = kind.half_axes[0] * scale * stretch, kind.half_axes[1] * scale / stretch
    tilt = 0.35 if kind.shape == "bean" else np.pi / 2
    threshold = area_threshold(kind.name) * body.size**2
    reach = max(a, b) * 1.3 + 1.5 / body.size
    mirror = -1.0 if not kind.side and rng.random() < _MIRRORED else 1.0
    xs = body.centre[0] + body.inner_half[0] * mirror * rng.uniform(*kind.home[:2], _TRIES)
    ys = body.centre[1] + body.inner_half[1] * rng.uniform(*kind.home[2:], _TRIES)
    angles = rng.uniform(-tilt, tilt, _TRIES)
    flips = rng.choice((-1.0, 1.0), _TRIES)
    possible = np.ones(_TRIES, bool)
    if kind.side:
        # The patient's right is at the image's left; the hollow of a kidney looks to the spine.
        flips[:] = 1.0 if kind.side == "right" else -1.0
        possible = (body.spine[0] - xs) * flips > 0.6 * a + 0.02
    # Most tries fail: a few points inside the outline tell so long before the whole mask does.
    cosines, sines = np.cos(angles), np.sin(angles)
    probe_u, probe_v = (axis[:, None] for axis in np.array(PROBES[kind.shape]).T)
    columns = (xs + probe_u * flips * a * cosines - probe_v * b * sines) * body.size
    rows = (ys + probe_u * flips * a * sines + probe_v * b * cosines) * body.size
    clipped = (np.clip(axis, 0, body.size - 1).astype(int) for axis in (rows, columns))
    possible &= free[tuple(clipped)].all(axis=0)
    for k in np.flatnonzero(possible):
        x, y = xs[k], ys[k]
        window = _window(x, y, reach, reach, body.size)
        dx, dy = body.x[window] - x, body.y[window] - y
        u = (dx * cosines[k] + dy * sines[k]) * flips[k] / a
        v = (dy * cosines[k] - dx * sines[k]) / b
        mask = outline(kind.shape, u, v) <= 1
        pixels = int(mask.sum())
        if pixels == 0 or not free[window][mask].all():
            continue
        far_enough = pixels / threshold if size == "large" else threshold / pixels
        if far_enough < SIZE_MARGIN:
            continue
        gap = 1.5 / body.size
        around = outline("ellipse", u / (1 + gap / a), v / (1 + gap / b)) <= 1
        return window, mask, around | mask, u, v
    return None


def _texture(rng, kind: OrganKind, look: Look, modality: str, u, v) -> Float[np.ndarray, "h w"]:
    level = look.body + rng.uniform(-look.spread, look.spread)
    texture = np.full(u.shape, level, np.float64)
    if look.blobs:
        phase = rng.uniform(0, 2 * np.pi, 2)
        texture += look.blobs * np.sin(3.1 * u + phase[0]) * np.sin(2.7 * v + phase[1])
    if look.vessels:
        for _ in range(4):
            x, y = rng.uniform(-0.6, 0.5), rng.uniform(-0.45, 0.45)
            texture[(u - x) ** 2 + (v - y) ** 2 < 0.022] += look.vessels
    if kind.shape == "bean":
        texture[((u - 0.45) / 0.42) ** 2 + (v / 0.42) ** 2 < 1] = look.inner
    if kind.shape == "ring":
        cavity = np.abs(u / 0.74) ** 2.8 + np.abs(v / 0.70) ** 2.8 < 1
        texture[cavity] = look.inner
        if modality == "CT":  # fluid settles at the back, gas in front
            rows = np.flatnonzero(cavity.any(axis=1))
            level = rows[0] + (rows[-1] - rows[0]) * rng.uniform(0.5, 0.75)
            fluid = cavity & (np.arange(len(cavity)) > level)[:, None]
            texture[fluid] = 12
    return texture


def _acquire(rng, picture: Float[np.ndarray, "H W"], modality: str, body: _Body):
    """Blur, noise and, for MR, coil shading: the picture as stored, and its rescale."""
    padded = np.pad(picture, 1, mode="edge")
    rows = (padded[:-2] + 2 * padded[1:-1] + padded[2:]) / 4
    picture = (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) / 4
    shape = picture.shape
    if modality == "CT":
        picture = picture + rng.uniform(7, 14) * rng.standard_normal(shape)
        return (np.clip(np.rint(picture), -1024, 3071) + 1024).astype(np.int16), (1.0, -1024.0)
    slope = rng.uniform(-0.25, 0.25, 2)
    shading = 1 + slope[0] * (body.x - 0.5) + slope[1] * (body.y - 0.5)
    noise = rng.uniform(0.012, 0.022) * rng.standard_normal((2, *shape))
    signal = np.hypot(picture * shading + noise[0], noise[1])  # magnitude images: Rician noise
    gain = 900 * np.exp(rng.uniform(-0.5, 0.5))  # units are arbitrary
    return np.rint(signal * gain).astype(np.int16), (1.0, 0.0)


@cache
def _grid(size: int) -> tuple[Float[np.ndarray, "H W"], Float[np.ndarray, "H W"]]:
    centres = (np.arange(size) + 0.5) / size
    x, y = np.meshgrid(centres, centres)
    x.flags.writeable = y.flags.writeable = False
    return x, y


def _window(x: float, y: float, a: float, b: float, size: int) -> tuple[slice, slice]:
    """The pixels around (x, y), a to the sides and b up and down, cut to the image."""
    return tuple(
        slice(max(0, int((at - reach) * size)), min(size, int((at + reach) * size) + 1))
        for at, reach in ((y, b), (x, a))
    )
