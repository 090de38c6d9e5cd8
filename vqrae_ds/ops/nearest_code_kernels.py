"""The Triton kernels of `ops/nearest_code_triton.py`, which says how they belong together.

Shapes: N tokens, K codes, D dimensions, s splits of the codes; n, k and d count those of one block.
All matrices are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from vqrae_ds.ops.code_distances import SAME

SAME_DISTANCE = tl.constexpr(SAME)
INFINITY = tl.constexpr(float("inf"))


@triton.jit
def norms_kernel(z_ND, origin_D, norm_N, D, BLOCK_D: tl.constexpr):
    """A program a token. Of one that is not finite it is nan; infinite, where the squares are."""
    n = tl.program_id(0).to(tl.int64)
    squares_d = tl.zeros((BLOCK_D,), tl.float32)
    zeros_d = tl.zeros((BLOCK_D,), tl.float32)
    for first in tl.range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        z_d = tl.load(z_ND + n * D + d, mask=d < D, other=0).to(tl.float32)
        zeros_d += z_d * 0  # or nan
        moved_d = z_d - tl.load(origin_D + d, mask=d < D, other=0)
        squares_d += moved_d * moved_d
    tl.store(norm_N + n, tl.sqrt(tl.sum(squares_d)) + tl.sum(zeros_d))


@triton.jit
def scores(
    z_ND,
    codes_KD,
    origin_D,
    half_norms_K,
    n,
    is_token_n,
    k,
    is_code_k,
    D,
    IN_BFLOAT16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Those of a block of tokens and codes (n, k); infinite where there is no such code.

    Each block of dimensions is summed on its own, and the sums are subtracted one after the other:
    an addition would be made part of the matrix product, and all be one long sum, whose error is
    larger by their number.
    """
    row_n = n.to(tl.int64) * D
    row_k = k.to(tl.int64) * D
    scores_nk = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in tl.range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        is_z = is_token_n[:, None] & (d[None, :] < D)
        is_code = is_code_k[:, None] & (d[None, :] < D)
        z_nd = tl.load(z_ND + row_n[:, None] + d[None, :], mask=is_z, other=0)
        codes_kd = tl.load(codes_KD + row_k[:, None] + d[None, :], mask=is_code, other=0)
        if not IN_BFLOAT16:  # codes in bf16 have their origin at 0
            origin_d = tl.load(origin_D + d, mask=d < D, other=0)
            z_nd = z_nd.to(tl.float32) - origin_d[None, :]
            codes_kd = codes_kd.to(tl.float32) - origin_d[None, :]
        scores_nk -= tl.dot(z_nd, tl.trans(codes_kd), input_precision="tf32x3")
    half_norms_k = tl.load(half_norms_K + k, mask=is_code_k, other=INFINITY)
    return scores_nk + half_norms_k[None, :]


@triton.jit
def screening_kernel(
    z_ND,
    codes_KD,
    origin_D,
    half_norms_K,
    smallest_Ns,
    index_Ns,
    second_Ns,
    N,
    K,
    D,
    codes_per_split,
    IN_BFLOAT16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The smallest score, its code and the second smallest, of a block of tokens and a split."""
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_k = tl.arange(0, BLOCK_K)
    smallest_n = tl.full((BLOCK_N,), INFINITY, tl.float32)
    second_n = tl.full((BLOCK_N,), INFINITY, tl.float32)
    index_n = tl.zeros((BLOCK_N,), tl.int32)
    first_code = split * codes_per_split
    end = tl.minimum(first_code + codes_per_split, K)
    for first in tl.range(first_code, end, BLOCK_K):
        k = first + column_k
        scores_nk = scores(
            z_ND,
            codes_KD,
            origin_D,
            half_norms_K,
            n,
            n < N,
            k,
            k < end,
            D,
            IN_BFLOAT16,
            BLOCK_N,
            BLOCK_K,
            BLOCK_D,
        )
        # Of what is not a number no order is known. Where there is one, no bound is finite.
        scores_nk = tl.where(scores_nk == scores_nk, scores_nk, INFINITY)
        best_n, place_n = tl.min(scores_nk, 1, return_indices=True)
        is_best_nk = column_k[None, :] == place_n[:, None]
        others_n = tl.min(tl.where(is_best_nk, INFINITY, scores_nk), 1)
        second_n = tl.minimum(second_n, tl.minimum(others_n, tl.maximum(best_n, smallest_n)))
        index_n = tl.where(best_n < smallest_n, first + place_n, index_n)
        smallest_n = tl.minimum(smallest_n, best_n)
    place_n = n.to(tl.int64) * tl.num_programs(1) + split
    tl.store(smallest_Ns + place_n, smallest_n, mask=n < N)
    tl.store(index_Ns + place_n, index_n, mask=n < N)
    tl.store(second_Ns + place_n, second_n, mask=n < N)


@triton.jit
def distances(z_ND, codes_KD, row_n, row_code_n, is_pair_n, D, BLOCK_D: tl.constexpr):
    """|z - c|^2 in float64 of a token and a code each (n,), from the differences."""
    d = tl.arange(0, BLOCK_D)
    squares_n = tl.zeros_like(row_n).to(tl.float64)
    for first in tl.range(0, D, BLOCK_D):
        is_value = is_pair_n[:, None] & ((first + d)[None, :] < D)
        place_nd = row_n[:, None] + (first + d)[None, :]
        z_nd = tl.load(z_ND + place_nd, mask=is_value, other=0).to(tl.float32)
        place_nd = row_code_n[:, None] + (first + d)[None, :]
        codes_nd = tl.load(codes_KD + place_nd, mask=is_value, other=0).to(tl.float32)
        difference_nd = z_nd.to(tl.float64) - codes_nd.to(tl.float64)
        squares_n += tl.sum(difference_nd * difference_nd, 1)
    return squares_n


@triton.jit
def settling_kernel(
    z_ND,
    codes_KD,
    origin_D,
    half_norms_K,
    limit_N,
    order_N,
    count,
    distance_N,
    index_N,
    K,
    D,
    IS_LAST: tl.constexpr,
    IN_BFLOAT16: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_PAIRS_D: tl.constexpr,
):
    """Programs share the blocks of codes of the first `count` tokens of the order.

    They find the smallest distance of each; the last time, the first code that has it.
    """
    num_tokens = tl.load(count)
    code_blocks = tl.cdiv(K, BLOCK_K)
    num_items = tl.cdiv(num_tokens, BLOCK_N) * code_blocks
    column_k = tl.arange(0, BLOCK_K)
    for item in tl.range(tl.program_id(0).to(tl.int64), num_items, tl.num_programs(0)):
        place_n = item // code_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
        is_token_n = place_n < num_tokens
        n = tl.load(order_N + place_n, mask=is_token_n, other=0)
        limit_n = tl.load(limit_N + n, mask=is_token_n, other=0)
        first = (item % code_blocks * BLOCK_K).to(tl.int32)
        k = first + column_k
        scores_nk = scores(
            z_ND,
            codes_KD,
            origin_D,
            half_norms_K,
            n,
            is_token_n,
            k,
            k < K,
            D,
            IN_BFLOAT16,
            BLOCK_N,
            BLOCK_K,
            BLOCK_D,
        )
        # What is not a number is near: its distance tells more.
        is_near_nk = ((scores_nk <= limit_n[:, None]) | (limit_n != limit_n)[:, None]) | (
            scores_nk != scores_nk
        )
        is_near_nk = is_near_nk & is_token_n[:, None] & (k < K)[None, :]
        column_n = tl.min(tl.where(is_near_nk, column_k[None, :], BLOCK_K), 1)
        while tl.min(column_n, 0) < BLOCK_K:  # each token takes the next of the codes near to it
            is_pair_n = column_n < BLOCK_K
            code_n = tl.where(is_pair_n, first + column_n, 0)
            row_code_n = code_n.to(tl.int64) * D
            distance_n = distances(z_ND, codes_KD, n * D, row_code_n, is_pair_n, D, BLOCK_PAIRS_D)
            if IS_LAST:
                limit64_n = tl.load(distance_N + n, mask=is_pair_n, other=0) * SAME_DISTANCE
                is_tied_n = is_pair_n & (distance_n <= limit64_n)
                tl.atomic_min(index_N + n, code_n.to(tl.int64), mask=is_tied_n)
            else:
                is_number_n = is_pair_n & (distance_n == distance_n)
                tl.atomic_min(distance_N + n, distance_n, mask=is_number_n)
            is_later_nk = is_near_nk & (column_k[None, :] > column_n[:, None])
            column_n = tl.min(tl.where(is_later_nk, column_k[None, :], BLOCK_K), 1)
