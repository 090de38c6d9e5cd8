"""The nearest code of every token by squared L2 distance, without the tokens x codes matrix.

Shapes: N tokens, K codes, D dimensions.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_TOKENS = 4096
TILE_CODES = 4096


@torch.no_grad()
def nearest_code(z_ND: Tensor, codes_KD: Tensor) -> Tensor:
    """Indices (N,) int64 of the codes with the smallest L2 distance; ties go to the lowest index.

    Distances are fp32 whatever the inputs: bf16 has 8 bits, and neighbouring codes differ in fewer. The token's
    own norm is left out, being the same for every code. Memory is bounded by one tile.
    """
    with torch.autocast(z_ND.device.type, enabled=False):
        codes_KD = codes_KD.float()
        half_norms_K = codes_KD.square().sum(1) / 2
        return torch.cat(
            [_nearest(z.float(), codes_KD, half_norms_K) for z in z_ND.split(TILE_TOKENS)]
        )


def _nearest(z_ND: Tensor, codes_KD: Tensor, half_norms_K: Tensor) -> Tensor:
    best_N = torch.full((len(z_ND),), torch.inf, device=z_ND.device)
    index_N = torch.zeros(len(z_ND), dtype=torch.int64, device=z_ND.device)
    for start in range(0, len(codes_KD), TILE_CODES):
        tile = slice(start, start + TILE_CODES)
        distance_NK = torch.addmm(half_norms_K[tile], z_ND, codes_KD[tile].T, alpha=-1)
        tile_best_N, tile_index_N = distance_NK.min(1)
        better_N = tile_best_N < best_N
        best_N = torch.where(better_N, tile_best_N, best_N)
        index_N = torch.where(better_N, tile_index_N + start, index_N)
    return index_N
