"""The Triton kernels of `ops/nearest_code_triton.py`, which says how they belong together.

Shapes: N tokens, K codes, D dimensions, S slots of a token; n, k and d count those of one block.
All matrices are contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

SAME = tl.constexpr(1 + 2.0**-40)  # distances in float64 that are no further apart are tied


@triton.jit
def norms_kernel(z_ND, origin_D, norm_N, D, BLOCK_D: tl.constexpr):
    """A program a token."""
    n = tl.program_id(0).to(tl.int64)
    squares_d = tl.zeros((BLOCK_D,), tl.float32)
    for first in tl.range(0, D, BLOCK_D):
        d = first + tl.arange(0, BLOCK_D)
        moved_d = tl.load(z_ND + n * D + d, mask=d < D, other=0).to(tl.float32)
        moved_d -= tl.load(origin_D + d, mask=d < D, other=0)
        squares_d += moved_d * moved_d
    tl.store(norm_N + n, tl.sqrt(tl.sum(squares_d)))


@triton.jit
def screening_kernel(
    z_ND,
    codes_KD,
    origin_D,
    half_norms_K,
    scores_NS,
    indices_NS,
    dropped_Ns,
    N,
    K,
    D,
    codes_per_split,
    IN_BFLOAT16: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program a block of tokens and a split of the codes."""
    split = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_n = n.to(tl.int64) * D
    column_k = tl.arange(0, BLOCK_K)
    slot_s = tl.arange(0, SLOTS)
    scores_ns = tl.full((BLOCK_N, SLOTS), float("inf"), tl.float32)
    indices_ns = tl.zeros((BLOCK_N, SLOTS), tl.int32)
    dropped_n = tl.full((BLOCK_N,), float("inf"), tl.float32)
    first_code = split * codes_per_split
    end = tl.minimum(first_code + codes_per_split, K)
    for first in tl.range(first_code, end, BLOCK_K):
        k = first + column_k
        row_k = k.to(tl.int64) * D
        products_nk = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
        for first_d in tl.range(0, D, BLOCK_D):
            d = first_d + tl.arange(0, BLOCK_D)
            is_z = (n[:, None] < N) & (d[None, :] < D)
            is_code = (k[:, None] < end) & (d[None, :] < D)
            z_nd = tl.load(z_ND + row_n[:, None] + d[None, :], mask=is_z, other=0)
            codes_kd = tl.load(codes_KD + row_k[:, None] + d[None, :], mask=is_code, other=0)
            if not IN_BFLOAT16:  # codes in bf16 have their origin at 0
                origin_d = tl.load(origin_D + d, mask=d < D, other=0)
                z_nd = z_nd.to(tl.float32) - origin_d[None, :]
                codes_kd = codes_kd.to(tl.float32) - origin_d[None, :]
            products_nk = tl.dot(z_nd, tl.trans(codes_kd), products_nk, input_precision="tf32x3")
        half_norms_k = tl.load(half_norms_K + k, mask=k < end, other=float("inf"))
        scores_nk = half_norms_k[None, :] - products_nk
        # Of what is not a number no order is known.
        scores_nk = tl.where(scores_nk == scores_nk, scores_nk, float("inf"))
        best_n, place_n = tl.min(scores_nk, 1, return_indices=True)
        is_best_nk = column_k[None, :] == place_n[:, None]
        others_n = tl.min(tl.where(is_best_nk, float("inf"), scores_nk), 1)
        worst_n, slot_n = tl.max(scores_ns, 1, return_indices=True)
        enters_n = best_n < worst_n
        is_taken_ns = enters_n[:, None] & (slot_s[None, :] == slot_n[:, None])
        scores_ns = tl.where(is_taken_ns, best_n[:, None], scores_ns)
        indices_ns = tl.where(is_taken_ns, (first + place_n)[:, None], indices_ns)
        left_n = tl.where(enters_n, worst_n, best_n)
        dropped_n = tl.minimum(dropped_n, tl.minimum(others_n, left_n))
    num_splits = tl.num_programs(1)
    own_n = n.to(tl.int64) * num_splits + split
    own_ns = own_n[:, None] * SLOTS + slot_s[None, :]
    tl.store(scores_NS + own_ns, scores_ns, mask=n[:, None] < N)
    tl.store(indices_NS + own_ns, indices_ns, mask=n[:, None] < N)
    tl.store(dropped_Ns + own_n, dropped_n, mask=n < N)


@triton.jit
def settling_kernel(
    z_ND,
    codes_KD,
    scores_NS,
    indices_NS,
    limit_N,
    index_N,
    K,
    D,
    SLOTS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program a token; most of them have one slot within the limit, and are done."""
    n = tl.program_id(0).to(tl.int64)
    limit = tl.load(limit_N + n)
    num_near = 0
    for slot in tl.range(0, SLOTS):
        num_near += (tl.load(scores_NS + n * SLOTS + slot) <= limit).to(tl.int32)
    is_crowded = tl.load(index_N + n) == K
    if (num_near > 1) & (is_crowded == 0):
        nearest = tl.full((), float("inf"), tl.float64)
        index = tl.full((), 0, tl.int32) + K
        for slot in tl.range(0, SLOTS):
            if tl.load(scores_NS + n * SLOTS + slot) <= limit:
                k = tl.load(indices_NS + n * SLOTS + slot)
                squares_d = tl.zeros((BLOCK_D,), tl.float64)
                for first in tl.range(0, D, BLOCK_D):
                    d = first + tl.arange(0, BLOCK_D)
                    z_d = (
                        tl.load(z_ND + n * D + d, mask=d < D, other=0).to(tl.float32).to(tl.float64)
                    )
                    place_d = k.to(tl.int64) * D + d
                    code_d = (
                        tl.load(codes_KD + place_d, mask=d < D, other=0)
                        .to(tl.float32)
                        .to(tl.float64)
                    )
                    squares_d += (z_d - code_d) * (z_d - code_d)
                distance = tl.sum(squares_d)
                is_nearer = (distance < nearest) | ((distance == nearest) & (k < index))
                nearest = tl.where(is_nearer, distance, nearest)
                index = tl.where(is_nearer, k, index)
        tl.store(index_N + n, index.to(tl.int64))


@triton.jit
def crowded_kernel(
    z_ND,
    codes_KD,
    order_N,
    count,
    distance_N,
    index_N,
    K,
    D,
    codes_per_range,
    RANGES: tl.constexpr,
    IS_LAST: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Programs share the ranges of codes of all crowded tokens, the first ones of the order."""
    num_items = tl.load(count) * RANGES
    for item in tl.range(tl.program_id(0).to(tl.int64), num_items, tl.num_programs(0)):
        n = tl.load(order_N + item // RANGES)
        start = (item % RANGES) * codes_per_range
        end = tl.minimum(start + codes_per_range, K)
        for first in tl.range(start, end, BLOCK_K):
            k = first + tl.arange(0, BLOCK_K)
            squares_k = tl.zeros((BLOCK_K,), tl.float64)
            for first_d in tl.range(0, D, BLOCK_D):
                d = first_d + tl.arange(0, BLOCK_D)
                z_d = tl.load(z_ND + n * D + d, mask=d < D, other=0).to(tl.float32).to(tl.float64)
                is_code = (k[:, None] < end) & (d[None, :] < D)
                place_kd = k[:, None].to(tl.int64) * D + d[None, :]
                codes_kd = (
                    tl.load(codes_KD + place_kd, mask=is_code, other=0)
                    .to(tl.float32)
                    .to(tl.float64)
                )
                difference_kd = z_d[None, :] - codes_kd
                squares_k += tl.sum(difference_kd * difference_kd, 1)
            squares_k = tl.where(k < end, squares_k, float("inf"))
            if IS_LAST:
                limit = tl.load(distance_N + n) * SAME
                tied_k = tl.where((squares_k <= limit) & (k < end), k, K)
                tl.atomic_min(index_N + n, tl.min(tied_k).to(tl.int64))
            else:
                tl.atomic_min(distance_N + n, tl.min(squares_k))
