"""The organs of the phantom: class, form, brightness, size, and where they may lie.

Lengths are shares of the image side. A form is a level function in the organ's own axes u and v,
which is at most 1 inside; with u and v divided by the half axes it has any size.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float

# An organ is small or large, nothing between: its visible area stays this factor away from the
# threshold of its class, so that a reader who measures a few pixels wrong still says the same.
SIZE_MARGIN = 1.15
SCALES = {"small": (0.78, 0.92), "large": (1.16, 1.34)}
_THRESHOLD_SCALE = 1.04


@dataclass(frozen=True)
class Look:
    """How bright the parts of an organ are: HU for CT, share of the brightest signal for MR."""

    body: float
    spread: float  # the level of one slice differs from `body` by up to this
    inner: float | None = None  # content of a ring, sinus of a kidney
    blobs: float = 0.0  # height of the slow variation inside
    vessels: float = 0.0  # height of the dots inside


@dataclass(frozen=True)
class OrganKind:
    """One class that can be drawn: its id in the schema, its form and its looks."""

    name: str
    class_id: int
    shape: str
    half_axes: tuple[float, float]
    # Where centres lie: (x_min, x_max, y_min, y_max), -1 and 1 being the ends of the interior.
    # Wide on purpose, and mirrored in a few slices: place is a hint, never the answer.
    home: tuple[float, float, float, float]
    ct: Look
    mr: Look
    side: str = ""  # "left" or "right": must lie on this side of the patient; "" = anywhere


# Sorted in the order in which texts name them. Names and ids are those of the class schema.
KINDS: dict[str, OrganKind] = {
    kind.name: kind
    for kind in (
        OrganKind(
            name="liver",
            class_id=5,
            shape="wedge",
            half_axes=(0.190, 0.138),
            home=(-0.85, 0.05, -0.75, 0.45),
            ct=Look(62.0, 8.0, blobs=10.0, vessels=55.0),
            mr=Look(0.26, 0.03, blobs=0.03, vessels=0.25),
        ),
        OrganKind(
            name="gallbladder",
            class_id=4,
            shape="ellipse",
            half_axes=(0.088, 0.070),
            home=(-0.7, 0.3, -0.8, 0.3),
            ct=Look(8.0, 4.0),
            mr=Look(0.95, 0.03),
        ),
        OrganKind(
            name="spleen",
            class_id=1,
            shape="crescent",
            half_axes=(0.140, 0.096),
            home=(0.15, 0.9, -0.6, 0.6),
            ct=Look(112.0, 7.0),
            mr=Look(0.43, 0.02),
        ),
        OrganKind(
            name="stomach",
            class_id=6,
            shape="ring",
            half_axes=(0.135, 0.108),
            home=(-0.15, 0.8, -0.9, 0.1),
            ct=Look(52.0, 6.0, inner=-820.0),
            mr=Look(0.16, 0.03, inner=0.90),
        ),
        OrganKind(
            name="kidney_right",
            class_id=2,
            shape="bean",
            half_axes=(0.084, 0.118),
            home=(-0.95, -0.1, -0.2, 0.9),
            side="right",
            ct=Look(170.0, 10.0, inner=20.0),
            mr=Look(0.82, 0.03, inner=1.0),
        ),
        OrganKind(
            name="kidney_left",
            class_id=3,
            shape="bean",
            half_axes=(0.084, 0.118),
            home=(0.1, 0.95, -0.2, 0.9),
            side="left",
            ct=Look(170.0, 10.0, inner=20.0),
            mr=Look(0.82, 0.03, inner=1.0),
        ),
        OrganKind(
            name="aorta",
            class_id=52,
            shape="disc",
            half_axes=(0.080, 0.080),
            home=(-0.45, 0.45, -0.2, 0.7),
            ct=Look(320.0, 25.0),
            mr=Look(0.03, 0.02),
        ),
    )
}
BY_CLASS_ID: dict[int, OrganKind] = {kind.class_id: kind for kind in KINDS.values()}
DEFAULT_ORGANS = ("liver", "stomach", "kidney_right", "kidney_left", "aorta")

_ROUND = ((0.0, 0.0), (0.9, 0.0), (-0.9, 0.0), (0.0, 0.9), (0.0, -0.9))
# Points (u, v) that lie inside each shape.
PROBES = {
    "ellipse": _ROUND,
    "disc": _ROUND,
    "ring": (*_ROUND, (0.7, 0.7), (-0.7, 0.7), (0.7, -0.7), (-0.7, -0.7)),
    "wedge": ((0.0, 0.0), (0.9, 0.0), (-0.9, 0.0), (-0.3, 0.8), (-0.3, -0.8)),
    "bean": ((0.0, 0.0), (-0.9, 0.0), (0.0, 0.9), (0.0, -0.9), (0.5, 0.7), (0.5, -0.7)),
    "crescent": ((0.0, 0.0), (0.9, 0.0), (-0.9, 0.0), (0.0, -0.9), (0.6, -0.6), (-0.6, -0.6)),
}


def outline(shape: str, u, v) -> Float[np.ndarray, "..."]:
    """The outline as a level: at most 1 inside, in the organ's own axes."""
    if shape in ("ellipse", "disc"):
        return u * u + v * v
    if shape == "ring":
        return np.abs(u) ** 2.8 + np.abs(v) ** 2.8
    if shape == "wedge":  # thick at one end, thin at the other
        return u * u + (v / (0.78 - 0.34 * u)) ** 2
    notch = {"bean": (1.12, 0.42, 0.40), "crescent": (1.15, 0.62, 0.75)}[shape]
    if shape == "crescent":
        u, v = v, u  # hollow along the long side
    cut = ((u - notch[0]) / notch[1]) ** 2 + (v / notch[2]) ** 2
    return np.where(cut < 1, 2.0, u * u + v * v)


@cache
def area_threshold(name: str) -> float:
    """The share of the image's area above which an organ of this class counts as large."""
    kind = KINDS[name]
    axis = np.linspace(-1.2, 1.2, 481)
    u, v = np.meshgrid(axis, axis)
    a, b = (half * _THRESHOLD_SCALE for half in kind.half_axes)
    return float((outline(kind.shape, u, v) <= 1).mean() * 2.4**2 * a * b)
