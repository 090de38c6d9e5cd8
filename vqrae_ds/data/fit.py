"""Pictures of any shape for a tokenizer that takes sides of whole tokens: crop, resize or pad."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vqrae_ds.config import check_image_size
from vqrae_ds.data.decode import load_image, open_image

Fit = Literal["crop", "resize", "pad"]


class FittedImage(NamedTuple):
    """`image_3HW` in [0, 1]. Its first `height` rows and `width` columns show the picture."""

    image_3HW: Tensor
    height: int
    width: int


def load_fitted(path: Path, fit: Fit, *, multiple: int, size: int | None = None) -> FittedImage:
    """Read a picture so that both sides are multiples of `multiple`.

    crop    the largest centre square, resized to `size`, which must be given
    resize  the whole picture; each side becomes the nearest multiple
    pad     the whole picture as it is; its last row and column are repeated up to the next multiple

    For resize and pad `size`, where given, is what the short side is brought to first. Raises
    `ValueError` for a file that is no picture and for a `size` that does not fit.
    """
    if fit == "crop":
        assert size is not None, "a square needs a side"
        check_image_size(size, multiple)
        return FittedImage(load_image(path, image_size=size), size, size)
    image = open_image(path)
    scale = 1.0 if size is None else size / min(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    if fit == "resize":
        width, height = (max(1, round(side / multiple)) * multiple for side in (width, height))
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    image_3HW = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    missing = (0, -width % multiple, 0, -height % multiple)
    return FittedImage(F.pad(image_3HW[None], missing, mode="replicate")[0], height, width)


def on_one_canvas(images: list[Tensor]) -> Tensor:
    """Images (3, H, W) of several sizes as one batch, each at the top left of a white canvas."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    padded = [
        F.pad(image, (0, width - image.shape[2], 0, height - image.shape[1]), value=1.0)
        for image in images
    ]
    return torch.stack(padded)
