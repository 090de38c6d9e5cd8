"""The nearest code of every token by squared L2 distance, without the tokens x codes matrix.

Shapes: N tokens, K codes, D dimensions; n and k count those of one tile.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_TOKENS = 4096
TILE_CODES = 4096
BLOCK = 64  # codes that a matrix product takes together, at most


@torch.no_grad()
def nearest_code(z_ND: Tensor, codes_KD: Tensor) -> Tensor:
    """Indices (N,) int64 of the codes at the smallest L2 distance; ties go to the lowest index.

    Distances are fp32 whatever the inputs and the autocast: bf16 keeps 8 bits, and neighbouring
    codes differ in fewer. (TF32, if torch is told to use it, keeps no more than 11.) Beyond inputs
    and result, memory is that of a tile. Where `z` is not finite the index means nothing, but is
    one of the codebook.
    """
    # Moving everything by one code changes no distance, and takes out an offset that all share,
    # beside which fp32 would lose the differences.
    origin_D = codes_KD[0].float()
    best_N = torch.full((len(z_ND),), torch.inf, dtype=torch.float32, device=z_ND.device)
    index_N = torch.zeros(len(z_ND), dtype=torch.int64, device=z_ND.device)
    for first_code in range(0, len(codes_KD), TILE_CODES):
        codes_kD = codes_KD[first_code : first_code + TILE_CODES].float() - origin_D
        if padding := -len(codes_kD) % BLOCK:  # equal codes tie only in blocks of equal size
            codes_kD = F.pad(codes_kD, (0, 0, 0, padding))  # with the origin: code 0 wins the tie
        half_norms_k = codes_kD.square().sum(1) / 2
        for first_token in range(0, len(z_ND), TILE_TOKENS):
            tile = slice(first_token, first_token + TILE_TOKENS)
            z_nD = z_ND[tile].float() - origin_D
            with torch.autocast(z_ND.device.type, enabled=False):
                # |z - c|^2 / 2 without |z|^2 / 2, which is the same for every code
                distance_nk = torch.addmm(half_norms_k, z_nD, codes_kD.T, alpha=-1)
            nearest_n, position_n = distance_nk.min(1)
            is_nearer_n = nearest_n < best_N[tile]
            best_N[tile] = torch.where(is_nearer_n, nearest_n, best_N[tile])
            index_N[tile] = torch.where(is_nearer_n, position_n + first_code, index_N[tile])
    return index_N
