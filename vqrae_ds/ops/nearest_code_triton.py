"""The search of `ops/nearest_code.py` by Triton kernels: one pass over the codes, no read back.

The result is that of the PyTorch search, for the argument is the same: `error_bound` holds for the
scores of the screening kernel. Tokens and codes in bf16 are multiplied as they are, for a product
of two of them is exact in fp32, in which they are summed. Others are multiplied as three products
of their TF32 halves, which leaves 2^-20 of each product: less than FEW_TERMS stands for.

Of each tile of codes a token keeps the best, and of these the best SLOTS; of all others it keeps
the smallest score. Where that is within the bound, one of the others may be the nearest, and the
token is crowded: all codes are gone through again for it. Otherwise the nearest is among the kept
ones. Both times distances are summed in float64 from the differences of the values as given.

Beyond inputs and result it needs some 70 bytes a token where a token has one block of codes, else
at most `SLOTS * 8` bytes a token and block of codes more; no matrix, and no copy of the codes.

This file imports Triton: import it where the machine has a use for it (`code_search`). On a CPU
it runs in Triton's interpreter alone, where TRITON_INTERPRET=1 is set before the import.

Shapes: N tokens, K codes, D dimensions, S slots of a token.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vqrae_ds.ops.nearest_code import CodeNorms, code_norms, error_bound
from vqrae_ds.ops.nearest_code_kernels import (
    crowded_kernel,
    norms_kernel,
    screening_kernel,
    settling_kernel,
)

SLOTS = 4
RANGES = 64  # of the codes, for the programs that go through them for one crowded token


class Blocks(NamedTuple):
    """What a program of the screening has at once, and how it is compiled.

    Two stages of fp32 tiles, or three of bf16 ones, fit into 96 KiB of shared memory.
    """

    tokens: int
    codes: int
    dimensions: int
    num_stages: int


BFLOAT16_BLOCKS = Blocks(128, 128, 64, 3)
FLOAT32_BLOCKS = Blocks(128, 128, 32, 2)


@torch.no_grad()
def nearest_code(z_ND: Tensor, codes_KD: Tensor, norms: CodeNorms | None = None) -> Tensor:
    """As `ops.nearest_code.nearest_code`, for tensors on a CUDA device."""
    norms = norms or code_norms(codes_KD)
    z_ND, codes_KD = z_ND.contiguous(), codes_KD.contiguous()
    N, K = len(z_ND), len(codes_KD)
    if not N:
        return torch.zeros(0, dtype=torch.int64, device=z_ND.device)
    with torch.cuda.device_of(z_ND):
        bound_N = error_bound(_norms(z_ND, norms.origin_D), norms, z_ND.shape[1])
        scores_NS, indices_NS, dropped_N = _screen(z_ND, codes_KD, norms)
        smallest_N, slot_N = scores_NS.min(1)
        limit_N = smallest_N + 2 * bound_N
        is_crowded_N = dropped_N <= limit_N
        index_N = indices_NS.gather(1, slot_N[:, None])[:, 0].long()
        index_N.masked_fill_(is_crowded_N, K)
        _settle(z_ND, codes_KD, scores_NS, indices_NS, limit_N, index_N)
        _search_again(z_ND, codes_KD, is_crowded_N, index_N)
    return index_N.clamp_(max=K - 1)  # distances that are not finite have no smallest


def _norms(z_ND: Tensor, origin_D: Tensor) -> Tensor:
    """|z - origin| of each token, (N,)."""
    norm_N = origin_D.new_empty(len(z_ND))
    norms_kernel[(len(z_ND),)](z_ND, origin_D, norm_N, z_ND.shape[1], BLOCK_D=512, num_warps=2)
    return norm_N


def _screen(z_ND: Tensor, codes_KD: Tensor, norms: CodeNorms) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and codes of the slots of each token, (N, S), and the smallest other score (N,).

    Where there are fewer blocks of tokens than processors, several go through the codes for one
    block of tokens, each with slots of its own.
    """
    (N, D), K = z_ND.shape, len(codes_KD)
    # In the interpreter of Triton 3.9 they are not: it multiplies the bits that they are kept in.
    in_bfloat16 = z_ND.dtype == codes_KD.dtype == torch.bfloat16 and z_ND.is_cuda
    blocks = BFLOAT16_BLOCKS if in_bfloat16 else FLOAT32_BLOCKS
    token_blocks, code_blocks = triton.cdiv(N, blocks.tokens), triton.cdiv(K, blocks.codes)
    splits = max(1, min(_num_processors(z_ND.device) // token_blocks, code_blocks))
    codes_per_split = triton.cdiv(code_blocks, splits) * blocks.codes
    splits = triton.cdiv(K, codes_per_split)
    scores_NS = norms.half_norms_K.new_empty(N, splits * SLOTS)
    indices_NS = torch.empty_like(scores_NS, dtype=torch.int32)
    dropped_Ns = scores_NS.new_empty(N, splits)
    screening_kernel[(token_blocks, splits)](
        *(z_ND, codes_KD, norms.origin_D, norms.half_norms_K),
        *(scores_NS, indices_NS, dropped_Ns),
        *(N, K, D, codes_per_split),
        IN_BFLOAT16=in_bfloat16,
        SLOTS=SLOTS,
        BLOCK_N=blocks.tokens,
        BLOCK_K=blocks.codes,
        BLOCK_D=blocks.dimensions,
        num_warps=8,
        num_stages=blocks.num_stages,
    )
    return scores_NS, indices_NS, dropped_Ns.amin(1)


def _settle(
    z_ND: Tensor,
    codes_KD: Tensor,
    scores_NS: Tensor,
    indices_NS: Tensor,
    limit_N: Tensor,
    index_N: Tensor,
) -> None:
    """Set `index_N` where several slots are within the limit."""
    settling_kernel[(len(z_ND),)](
        *(z_ND, codes_KD, scores_NS, indices_NS, limit_N, index_N),
        *(len(codes_KD), z_ND.shape[1]),
        SLOTS=scores_NS.shape[1],
        BLOCK_D=512,
        num_warps=2,
    )


def _search_again(z_ND: Tensor, codes_KD: Tensor, is_crowded_N: Tensor, index_N: Tensor) -> None:
    """Set `index_N` of the crowded tokens, wherever they are and however many.

    The kernel is told where and how many by tensors, so that nobody waits for the device.
    """
    K, D = codes_KD.shape
    order_N = is_crowded_N.to(torch.uint8).argsort(descending=True)
    count = is_crowded_N.sum()
    distance_N = torch.full_like(index_N, torch.inf, dtype=torch.float64)
    for is_last in (False, True):  # the smallest distance; then the first code that has it
        crowded_kernel[(4 * _num_processors(z_ND.device),)](
            *(z_ND, codes_KD, order_N, count, distance_N, index_N),
            *(K, D, triton.cdiv(K, RANGES)),
            RANGES=RANGES,
            IS_LAST=is_last,
            BLOCK_K=16,
            BLOCK_D=128,
        )


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter: any number, but one would leave paths unused
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
