"""The search of `ops/nearest_code.py` by Triton kernels: nothing is read back from the device.

The result is that of the PyTorch search, for the argument is the same: `error_bound` holds for the
scores of the kernels. Tokens and codes in bf16 are multiplied as they are, for a product of two of
them is exact in fp32, in which they are summed. Others are multiplied as three products of their
TF32 halves, which leaves 2^-20 of each product: less than FEW_TERMS stands for. Sums are those of
one block of dimensions, then of the blocks, so that the longest has few terms, whatever D is.

The screening goes through the codes once and keeps, for each token, the smallest score, its code,
and the second smallest score. Where that is out of the bound's reach the code is the answer. The
other tokens, one in a hundred of random ones, are gathered in blocks that go through the codes
again: of each code within reach the distance is taken in float64, from the differences of the
values as given. Twice, for the smallest distance, and then for the first code that ties with it.

Beyond inputs and result it needs some 80 bytes a token, where tokens fill the GPU, else 12 bytes a
token and split of the codes more; no matrix, and no copy of the codes.

This file imports Triton: import it where the machine has a use for it (`code_search`). On a CPU
it runs in Triton's interpreter alone, where TRITON_INTERPRET=1 is set before the import.

Shapes: N tokens, K codes, D dimensions, s splits of the codes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from vqrae_ds.ops.nearest_code import CodeNorms, code_norms, error_bound
from vqrae_ds.ops.nearest_code_kernels import norms_kernel, screening_kernel, settling_kernel

HOPPER = 9  # the first generation that multiplies what lies in shared memory
PAIRS_DIMENSIONS = 16


class Blocks(NamedTuple):
    """What a program has at once, and how it is compiled.

    Chosen so that the tiles fit into 99 KiB of shared memory, and all else into the registers.
    """

    tokens: int
    codes: int
    dimensions: int
    num_warps: int
    num_stages: int


class Plan(NamedTuple):
    """The blocks of both kernels."""

    screening: Blocks
    settling: Blocks
    in_bfloat16: bool


class Screened(NamedTuple):
    """The smallest score of each token and split, its code, and the second smallest score."""

    smallest_Ns: Tensor
    index_Ns: Tensor
    second_Ns: Tensor


def plan_of(dtypes: tuple[torch.dtype, torch.dtype], generation: int) -> Plan:
    """For tokens and codes in `dtypes` on a GPU of a compute capability `generation`.x."""
    if set(dtypes) != {torch.bfloat16}:
        return Plan(Blocks(128, 64, 32, 8, 2), Blocks(64, 64, 16, 4, 2), in_bfloat16=False)
    settling = Blocks(64, 64, 32, 4, 3)
    if generation >= HOPPER:
        return Plan(Blocks(128, 128, 64, 8, 3), settling, in_bfloat16=True)
    return Plan(Blocks(128, 128, 32, 8, 4), settling, in_bfloat16=True)


@torch.no_grad()
def nearest_code(z_ND: Tensor, codes_KD: Tensor, norms: CodeNorms | None = None) -> Tensor:
    """As `ops.nearest_code.nearest_code`, for tensors on a CUDA device."""
    norms = norms or code_norms(codes_KD)
    z_ND, codes_KD = z_ND.contiguous(), codes_KD.contiguous()
    if not len(z_ND):
        return torch.zeros(0, dtype=torch.int64, device=z_ND.device)
    with torch.cuda.device_of(z_ND):
        plan = _plan(z_ND, codes_KD)
        screened = _screen(z_ND, codes_KD, norms, plan)
        smallest_N, split_N = screened.smallest_Ns.min(1)
        bound_N = _bound(z_ND, norms, plan)
        limit_N = smallest_N + 2 * bound_N
        num_near_N = (screened.smallest_Ns <= limit_N[:, None]).sum(1, dtype=torch.int32)
        num_near_N += (screened.second_Ns <= limit_N[:, None]).sum(1, dtype=torch.int32)
        is_alone_N = (num_near_N == 1) & limit_N.isfinite() | bound_N.isnan()
        index_N = screened.index_Ns.gather(1, split_N[:, None])[:, 0].long()
        _settle(z_ND, codes_KD, norms, plan, limit_N, is_alone_N, index_N)
    return index_N


def _plan(z_ND: Tensor, codes_KD: Tensor) -> Plan:
    if not z_ND.is_cuda:  # the interpreter of Triton 3.9 multiplies the bits that bf16 is kept in
        return plan_of((torch.float32, torch.float32), HOPPER)
    generation, _ = torch.cuda.get_device_capability(z_ND.device)
    return plan_of((z_ND.dtype, codes_KD.dtype), generation)


def _bound(z_ND: Tensor, norms: CodeNorms, plan: Plan) -> Tensor:
    """The error (N,) of a score of each token, of either kernel."""
    N, D = z_ND.shape
    norm_N = norms.origin_D.new_empty(N)
    norms_kernel[(N,)](
        z_ND, norms.origin_D, norm_N, D, BLOCK_D=512, num_warps=2, enable_fp_fusion=True
    )
    additions = max(num_additions(blocks, D) for blocks in (plan.screening, plan.settling))
    return error_bound(norm_N, norms, D, additions)


def num_additions(blocks: Blocks, dimensions: int) -> int:
    """That a product goes through at most: those of its block, and then one for each block."""
    return blocks.dimensions + triton.cdiv(dimensions, blocks.dimensions)


def _screen(z_ND: Tensor, codes_KD: Tensor, norms: CodeNorms, plan: Plan) -> Screened:
    """Where there are fewer blocks of tokens than processors, several programs share the codes."""
    (N, D), K, blocks = z_ND.shape, len(codes_KD), plan.screening
    token_blocks, code_blocks = triton.cdiv(N, blocks.tokens), triton.cdiv(K, blocks.codes)
    splits = max(1, min(_num_processors(z_ND.device) // token_blocks, code_blocks))
    codes_per_split = triton.cdiv(code_blocks, splits) * blocks.codes
    splits = triton.cdiv(K, codes_per_split)
    smallest_Ns = norms.half_norms_K.new_empty(N, splits)
    index_Ns = torch.empty_like(smallest_Ns, dtype=torch.int32)
    second_Ns = torch.empty_like(smallest_Ns)
    screening_kernel[(token_blocks, splits)](
        z_ND,
        codes_KD,
        norms.origin_D,
        norms.half_norms_K,
        smallest_Ns,
        index_Ns,
        second_Ns,
        N,
        K,
        D,
        codes_per_split,
        **_options(blocks, plan),
    )
    return Screened(smallest_Ns, index_Ns, second_Ns)


def _settle(
    z_ND: Tensor,
    codes_KD: Tensor,
    norms: CodeNorms,
    plan: Plan,
    limit_N: Tensor,
    is_alone_N: Tensor,
    index_N: Tensor,
) -> None:
    """Set `index_N` of the tokens that are not alone, wherever they are and however many.

    The kernel is told where and how many by tensors, so that nobody waits for the device.
    """
    K, D = codes_KD.shape
    index_N.masked_fill_(~is_alone_N, K)
    number_N = (~is_alone_N).cumsum(0)
    count = number_N[-1:]
    token_N = torch.arange(len(z_ND), device=z_ND.device)
    place_N = torch.where(is_alone_N, count + token_N - number_N, number_N - 1)
    order_N = torch.empty_like(token_N).scatter_(0, place_N, token_N)  # the others come first
    distance_N = torch.full_like(index_N, torch.inf, dtype=torch.float64)
    for is_last in (False, True):
        settling_kernel[(2 * _num_processors(z_ND.device),)](
            z_ND,
            codes_KD,
            norms.origin_D,
            norms.half_norms_K,
            limit_N,
            order_N,
            count,
            distance_N,
            index_N,
            K,
            D,
            IS_LAST=is_last,
            BLOCK_PAIRS_D=PAIRS_DIMENSIONS,
            **_options(plan.settling, plan),
        )
    index_N.clamp_(max=K - 1)  # distances that are not numbers have no smallest


def _options(blocks: Blocks, plan: Plan) -> dict[str, bool | int]:
    return {
        "IN_BFLOAT16": plan.in_bfloat16,
        "BLOCK_N": blocks.tokens,
        "BLOCK_K": blocks.codes,
        "BLOCK_D": blocks.dimensions,
        "num_warps": blocks.num_warps,
        "num_stages": blocks.num_stages,
        "enable_fp_fusion": True,
    }


def _num_processors(device: torch.device) -> int:
    if device.type != "cuda":  # the interpreter: any number, but one would leave paths unused
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
