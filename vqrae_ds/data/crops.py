"""Which part of an image is seen: the largest centre square, or a random one.

A random crop is a pure function of (seed, epoch, sample), so that a resumed run sees the same
pixels bit for bit.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import NamedTuple

import xxhash


@dataclass(frozen=True)
class Augmentation:
    """Random square crops; areas are shares of the largest centred square (1.0: the short side)."""

    crop_scale_min: float  # 0 < min <= max <= 1
    crop_scale_max: float
    horizontal_flip: bool  # mirror every second image, on average

    def __post_init__(self) -> None:
        if not 0 < self.crop_scale_min <= self.crop_scale_max <= 1:
            scales = (
                f"crop_scale_min {self.crop_scale_min} and crop_scale_max {self.crop_scale_max}"
            )
            raise ValueError(f"{scales} must satisfy 0 < min <= max <= 1")


class Crop(NamedTuple):
    """A square of an upright image, in whole pixels, mirrored left to right or not."""

    left: int
    top: int
    side: int
    mirrored: bool


class SampleSeed(NamedTuple):
    """All that a sample's random crop depends on."""

    seed: int
    epoch: int
    sample: int


def centre_crop(width: int, height: int) -> Crop:
    """The largest centred square: the deterministic view for evaluation."""
    side = min(width, height)
    return Crop((width - side) // 2, (height - side) // 2, side, mirrored=False)


def random_crop(width: int, height: int, *, augmentation: Augmentation, seed: SampleSeed) -> Crop:
    """A square of random area and place, wholly inside the image."""
    label = f"crop {seed.seed} {seed.epoch} {seed.sample}"
    draw = random.Random(xxhash.xxh3_64_intdigest(label.encode())).random
    scale_min, scale_max = augmentation.crop_scale_min, augmentation.crop_scale_max
    scale = scale_min + (scale_max - scale_min) * draw()
    side = max(1, round(min(width, height) * math.sqrt(scale)))
    left, top = int(draw() * (width - side + 1)), int(draw() * (height - side + 1))
    return Crop(left, top, side, mirrored=augmentation.horizontal_flip and draw() < 0.5)
