"""Pictures: rows of images side by side, as a grid that can be saved."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.utils import make_grid, save_image

ERROR_SCALE = 4.0  # an error of a quarter of the range is white


def image_grid(columns: Sequence[Tensor], *, min_side: int = 0) -> Tensor:
    """One row an image, one column a version of it: (3, H, W) in [0, 1].

    `columns` are batches (B, 3, h, w) of equal size. Images smaller than `min_side` pixels are
    enlarged by a whole factor without smoothing, so that what is seen is what was decoded.
    """
    B, _, side, _ = columns[0].shape
    rows_BC3hw = torch.stack([c.cpu().float().clamp(0, 1) for c in columns], dim=1)
    images = rows_BC3hw.flatten(0, 1)
    factor = max(1, -(-min_side // side))
    images = F.interpolate(images, scale_factor=factor, mode="nearest")
    return make_grid(images, nrow=len(columns), padding=4, pad_value=1.0)


def error_map(images_hat_B3HW: Tensor, images_B3HW: Tensor) -> Tensor:
    """The absolute error of each pixel, mean over the channels: grey images (B, 3, H, W).

    `ERROR_SCALE` times the error, clamped to [0, 1]. It is the same for all images, so that maps of
    two steps can be compared.
    """
    error_B1HW = (images_hat_B3HW.float() - images_B3HW.float()).abs().mean(1, keepdim=True)
    return (ERROR_SCALE * error_B1HW).clamp(0, 1).expand_as(images_B3HW)


def code_map(indices_Bhw: Tensor, token_side: int) -> Tensor:
    """A colour a code, the same one in every picture: (B, 3, h * token_side, w * token_side).

    Neighbouring numbers are far apart in hue, for neighbouring codes have nothing in common.
    """
    # Steps by the golden ratio and by two other irrationals never come near where they have been.
    hue = (indices_Bhw.double() * 0.6180339887498949) % 1
    saturation = 0.45 + 0.55 * ((indices_Bhw.double() * 0.4142135623730951) % 1)
    value = 0.55 + 0.45 * ((indices_Bhw.double() * 0.7320508075688772) % 1)
    offsets_3 = torch.tensor([5.0, 3.0, 1.0], dtype=torch.float64)
    # The usual HSV to RGB: c(n) = v - v s max(0, min(k, 4 - k, 1)), k = (n + 6 h) mod 6.
    k_3Bhw = (offsets_3[:, None, None, None] + 6 * hue) % 6
    ramp_3Bhw = torch.minimum(k_3Bhw, 4 - k_3Bhw).clamp(0, 1)
    colours_B3hw = (value - value * saturation * ramp_3Bhw).transpose(0, 1).float()
    return colours_B3hw.repeat_interleave(token_side, 2).repeat_interleave(token_side, 3)


def save_grid(grid_3HW: Tensor, path: Path) -> None:
    """Write the grid as PNG, the folder made if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_image(grid_3HW, path)
