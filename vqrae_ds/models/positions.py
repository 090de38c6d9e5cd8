"""Learned position embeddings on grids that they were not learned on."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def resize_positions(positions_1ND: Tensor, h: int, w: int) -> Tensor:
    """A square grid of vectors as (1, h * w, D): bicubic, in fp32 whatever the dtype, which stays.

    bf16 has 8 bits: its rounding inside the interpolation would move a position by more than
    neighbours differ. At the grid's own size the vectors are returned as they are.
    """
    side = round(positions_1ND.shape[1] ** 0.5)
    if (h, w) == (side, side):
        return positions_1ND
    grid_1Dss = rearrange(positions_1ND.float(), "1 (s t) d -> 1 d s t", s=side)
    grid_1Dhw = F.interpolate(grid_1Dss, (h, w), mode="bicubic", align_corners=False)
    return rearrange(grid_1Dhw, "1 d h w -> 1 (h w) d").to(positions_1ND.dtype)
