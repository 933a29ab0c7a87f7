"""Random changes of an image that its boxes and masks follow: crop, contrast, brightness, window.

The recipe of the published segmentation models; the detection models were trained without. All
draws for one sample are made at once (`draw`), from the sample's own generator, so that nothing
depends on which worker makes it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from rg_jax.grounding.boxes import Box


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """What may change, how often and how far.

    `crop_min`: smallest share of each side that a crop keeps (1 = never crop). `contrast_p`,
    `gamma`: how often, and the range of, ((x - min) / range)^gamma. `shift_p`, `shift`: raw units
    before windowing; `picture_shift`: for ordinary pictures, after normalising. `single_window_p`:
    how often a CT slice shows one window in all three channels.
    """

    crop_min: float = 0.9
    contrast_p: float = 0.3
    gamma: tuple[float, float] = (0.7, 1.2)
    shift_p: float = 0.5
    shift: float = 20.0
    picture_shift: float = 0.1
    single_window_p: float = 0.2


@dataclasses.dataclass(frozen=True)
class Crop:
    """The part of a source image that is shown: pixels, maxima exclusive, and the whole size.

    Places are given relative to the part: `place` takes a box in source pixels, `map_box` a
    normalised one; both return None where less than 1 px² of the box remains.
    """

    x_min: int
    y_min: int
    x_max: int
    y_max: int
    width: int
    height: int

    @classmethod
    def full(cls, width: int, height: int) -> "Crop":
        """The whole image."""
        return cls(0, 0, width, height, width, height)

    @property
    def is_full(self) -> bool:
        """Whether nothing is cut away."""
        part = (self.x_min, self.y_min, self.x_max, self.y_max)
        return part == (0, 0, self.width, self.height)

    def place(self, box_px: Sequence[float | int]) -> Box | None:
        """Box in source pixels → shares of the crop's sides."""
        x_min, y_min = max(box_px[0], self.x_min), max(box_px[1], self.y_min)
        x_max, y_max = min(box_px[2], self.x_max), min(box_px[3], self.y_max)
        if x_min >= x_max or y_min >= y_max or (x_max - x_min) * (y_max - y_min) < 1:
            return None
        width, height = self.x_max - self.x_min, self.y_max - self.y_min
        return (
            (x_min - self.x_min) / width,
            (y_min - self.y_min) / height,
            (x_max - self.x_min) / width,
            (y_max - self.y_min) / height,
        )

    def map_box(self, box: Sequence[float | int]) -> Box | None:
        """Box in shares of the whole image → shares of the crop's sides."""
        w, h = self.width, self.height
        return self.place((box[0] * w, box[1] * h, box[2] * w, box[3] * h))

    def cut(self, array: np.ndarray) -> np.ndarray:
        """The part of an array (H, W, …) of the source's size, as a view: image or class map."""
        return array[self.y_min : self.y_max, self.x_min : self.x_max]

    def masks(self, segmentation: UInt8[np.ndarray, "H W"]) -> np.ndarray:
        """The class map of the crop; an absent one (0, 0) stays absent."""
        return self.cut(segmentation) if segmentation.size else segmentation


@dataclasses.dataclass(frozen=True)
class Draw:
    """One sample's draws. `gamma` 1, `shift` and `picture_shift` 0, `window` -1 change nothing."""

    crop: Crop
    gamma: float = 1.0
    shift: float = 0.0
    picture_shift: float = 0.0
    window: int = -1

    def without_crop(self) -> "Draw":
        """The same draw, showing the whole image."""
        return dataclasses.replace(self, crop=Crop.full(self.crop.width, self.crop.height))


def draw(
    config: AugmentConfig | None, width: int, height: int, rng: np.random.Generator | None
) -> Draw:
    """Draws for one sample; without a config, or without a generator, nothing changes."""
    if config is None or rng is None:
        return Draw(Crop.full(width, height))
    # Always the same number of draws: a change of one probability leaves the others' draws alone.
    sides = rng.uniform(config.crop_min, 1.0, 2)
    places = rng.uniform(0.0, 1.0, 2)
    chance = rng.uniform(0.0, 1.0, 3)
    gamma = rng.uniform(*config.gamma)
    sign = rng.uniform(-1.0, 1.0)
    window = int(rng.integers(3))
    crop_width = max(1, round(width * sides[0]))
    crop_height = max(1, round(height * sides[1]))
    x_min = round((width - crop_width) * places[0])
    y_min = round((height - crop_height) * places[1])
    shifted = chance[1] < config.shift_p
    return Draw(
        Crop(x_min, y_min, x_min + crop_width, y_min + crop_height, width, height),
        gamma=gamma if chance[0] < config.contrast_p else 1.0,
        shift=sign * config.shift if shifted else 0.0,
        picture_shift=sign * config.picture_shift if shifted else 0.0,
        window=window if chance[2] < config.single_window_p else -1,
    )
