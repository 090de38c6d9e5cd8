"""Distances in float64, and what the nearest code of a token is, for every search alike.

It is the lowest index among the codes whose distance to the token is at most SAME times the
smallest one. A distance is |z - c|^2, summed in float64 from the differences of the values as they
are given. Sums that differ in their order alone are no further apart than that, so ties do not
depend on the machine, the tiles, or the ranks that share the codes.

Shapes: N tokens, K codes, D dimensions, M candidates of a token, P pairs of a token and a code;
n and k count those of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SAME = 1 + 2.0**-40
TILE_PAIRS = 128
TILE_CODES = 512
# Of a score, as those of `nearest_code` are in fp32.
ROUNDING_OF_A_TERM = 4 * 2.0**-53
FEW_TERMS = 16


def pair_distances(
    z_ND: Tensor, codes_KD: Tensor, token_P: Tensor, code_P: Tensor, tile: int = TILE_PAIRS
) -> Tensor:
    """The distance (P,) of each pair, fp64; memory beside that of the result is that of a tile."""
    distance_P = torch.empty(len(token_P), dtype=torch.float64, device=z_ND.device)
    tiles = (t.split(tile) for t in (token_P, code_P, distance_P))
    for token_p, code_p, distance_p in zip(*tiles, strict=True):
        difference_pD = z_ND[token_p].double().sub_(codes_KD[code_p])
        torch.sum(difference_pD.square_(), 1, out=distance_p)
        del difference_pD  # before the next one is made
    return distance_P


def lowest_tied(distances_NM: Tensor, indices_NM: Tensor) -> Tensor:
    """The nearest code (N,) of those of each token; where a distance is nan, the last of them."""
    is_tied_NM = distances_NM <= SAME * distances_NM.amin(1, keepdim=True)
    return torch.where(is_tied_NM, indices_NM, indices_NM.amax(1, keepdim=True)).amin(1)


def nearest_of_pairs(
    distance_P: Tensor, token_P: Tensor, code_P: Tensor, num_tokens: int
) -> Tensor:
    """The nearest code (N,) of those that each token is paired with; 0 where that is none."""
    smallest_N = distance_P.new_full((num_tokens,), torch.inf)
    smallest_N.scatter_reduce_(0, token_P, distance_P, "amin")
    is_tied_P = distance_P <= SAME * smallest_N[token_P]
    index_N = torch.zeros(num_tokens, dtype=torch.int64, device=code_P.device)
    return index_N.scatter_reduce_(
        0, token_P[is_tied_P], code_P[is_tied_P], "amin", include_self=False
    )


def search_in_float64(z_ND: Tensor, codes_KD: Tensor) -> Tensor:
    """Indices (N,) of the nearest codes, by scores in float64 that leave few pairs to settle.

    For tokens with so many codes as near as the nearest, to within fp32, that a screening did not
    keep them. Memory is that of N tokens and a tile of codes. A code that equals one before it is
    no candidate, for where all codes have become one, all of them would be.
    """
    origin_D = codes_KD[0].double()
    moved_ND = z_ND.double().sub_(origin_D)
    norm_N, largest = moved_ND.norm(dim=1), moved_ND.new_zeros(())
    smallest_N = torch.full_like(norm_N, torch.inf)
    is_copy_K = _is_copy(codes_KD)

    def scored_tiles() -> Iterator[tuple[int, Tensor]]:
        for first in range(0, len(codes_KD), TILE_CODES):
            tile = slice(first, first + TILE_CODES)
            moved_kD = codes_KD[tile].double().sub_(origin_D)
            half_norms_k = moved_kD.square().sum(1) / 2
            largest.copy_(torch.maximum(largest, (2 * half_norms_k.amax()).sqrt()))
            half_norms_k[is_copy_K[tile]] = torch.inf
            yield first, torch.addmm(half_norms_k, moved_ND, moved_kD.T, alpha=-1)

    for _, scores_nk in scored_tiles():
        smallest_N = torch.minimum(smallest_N, scores_nk.amin(1))
    reach_N = norm_N + largest
    error_N = (z_ND.shape[1] + FEW_TERMS) * ROUNDING_OF_A_TERM * largest * reach_N
    limit_N = smallest_N + 2 * error_N + (SAME - 1) / 2 * reach_N.square()
    limit_N1 = limit_N.where(norm_N.isfinite(), -torch.inf)[:, None]
    nearest_N = torch.full_like(smallest_N, torch.inf)
    index_N = torch.full((len(z_ND),), len(codes_KD) - 1, device=z_ND.device)
    for is_last in (False, True):  # the smallest distance; then the first code that ties with it
        for first, scores_nk in scored_tiles():
            token_P, column_P = (scores_nk <= limit_N1).nonzero(as_tuple=True)
            code_P = column_P + first
            distance_P = pair_distances(z_ND, codes_KD, token_P, code_P)
            if is_last:
                is_tied_P = distance_P <= SAME * nearest_N[token_P]
                index_N.scatter_reduce_(0, token_P[is_tied_P], code_P[is_tied_P], "amin")
            else:
                nearest_N.scatter_reduce_(0, token_P, distance_P, "amin")
    return index_N


def _is_copy(codes_KD: Tensor) -> Tensor:
    """Whether each code (K,) is bit by bit one that comes before it."""
    generator = torch.Generator().manual_seed(0)
    bits = torch.int16 if codes_KD.dtype == torch.bfloat16 else torch.int32
    factors_D = torch.randint(-(2**62), 2**62, (codes_KD.shape[1],), generator=generator)
    factors_D = factors_D.to(codes_KD.device)
    hash_K = torch.cat(
        [
            (codes_kD.contiguous().view(bits).long() * factors_D).sum(1)
            for codes_kD in codes_KD.split(TILE_CODES)
        ]
    )
    _, group_K = hash_K.unique(return_inverse=True)
    code_K = torch.arange(len(codes_KD), device=codes_KD.device)
    first_K = torch.full_like(code_K, len(code_K)).scatter_reduce_(0, group_K, code_K, "amin")
    original_K = first_K[group_K]
    tiles = zip(codes_KD.split(TILE_CODES), original_K.split(TILE_CODES), strict=True)
    is_equal_K = torch.cat([(codes_kD == codes_KD[k]).all(1) for codes_kD, k in tiles])
    return is_equal_K & (original_K < code_K)
