"""The nearest code of every token by L2 distance, without the tokens x codes matrix.

A search screens, then settles. Screening goes through the codes tile by tile with matrix products
in low precision, and keeps for each token the codes that could be the nearest (`near_codes`). An
error bound, measured on these very tokens and codes, says which:

    score(z, c) = |c|^2 / 2 - <z, c>, of which |z - c|^2 is twice, plus |z|^2, the same for all c
    |screened score - score| <= bound(z), so that the nearest code has a screened score within
    2 bound(z) of the smallest one

Where one code alone is within, it is the answer. Where a few are, `code_distances` says which of
them is the nearest. Where many are, the token is crowded, and screened again in higher precision.
So the result is that of an exact search, on any machine and with any size of tile.

Shapes: N tokens, K codes, D dimensions, P pairs of a token and a code; n and k count those of one
tile.
"""

from __future__ import annotations

import functools
import os
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from vqrae_ds.ops.code_distances import (
    SAME,
    nearest_of_pairs,
    pair_distances,
    search_in_float64,
)
from vqrae_ds.ops.near_codes import Found, NearCodes, Pairs

TILE_TOKENS = 2048
TILE_CODES = 1024
TILE_NORMS = 512  # codes

# Of a sum of D products in fp32, relative to |z| |c|, each term rounded four times: once would do
# on a CPU (Higham, "Accuracy and Stability of Numerical Algorithms", 3.1), the matrix units of a
# GPU truncate, and the codes' norms and the shift of the origin are rounded as well.
ROUNDING_OF_A_TERM = 4 * 2.0**-24
FEW_TERMS = 16  # so that it holds for a few dimensions too
MARGIN = 1.01  # the norms that make the bound are rounded themselves
# Of a product: fp32 ends at 2^-126, and what the norms lose by it, as they are sums of squares, is
# 2^-63 of a value, which beside a norm as small as that is 2^-126 over the 2^-22 of the bound.
TINY = 2.0**-100
ROUNDING_TO_BFLOAT16 = 2.0**-8
ROUNDING_MODES = ("BF16", "F16", "TF32", "ANY")  # of oneDNN


class CodeNorms(NamedTuple):
    """What a search wants to know of the codes, whatever the tokens; all fp32.

    All is of codes that are moved by `origin_D`: a shift changes no distance, and takes out an
    offset that all share, beside which the differences would be lost. Codes in bf16 are not moved,
    for in bf16 they are exact as they are.
    """

    origin_D: Tensor
    half_norms_K: Tensor  # |c|^2 / 2
    largest: Tensor  # () the largest |c|
    largest_rounding: Tensor  # () the largest |c - bf16(c)|


class Search(Protocol):
    """Finds the nearest codes."""

    def __call__(self, z_ND: Tensor, codes_KD: Tensor, norms: CodeNorms) -> Tensor:
        """Indices (N,) int64."""


@torch.no_grad()
def code_norms(codes_KD: Tensor) -> CodeNorms:
    """The norms of codes in fp32 or bf16; more memory than that of the result is that of a tile."""
    origin_D = codes_KD[0].float()
    if codes_KD.dtype == torch.bfloat16:
        origin_D = torch.zeros_like(origin_D)
    half_norms_K = torch.empty(len(codes_KD), dtype=torch.float32, device=codes_KD.device)
    largest_rounding = half_norms_K.new_zeros(())
    for codes_kD, half_norms_k in zip(
        codes_KD.split(TILE_NORMS), half_norms_K.split(TILE_NORMS), strict=True
    ):
        moved_kD = codes_kD.float() - origin_D
        half_norms_k.copy_(moved_kD.square().sum(1) / 2)
        rounding_k = (moved_kD - moved_kD.bfloat16()).norm(dim=1)
        largest_rounding = torch.maximum(largest_rounding, rounding_k.max())
    largest = (2 * half_norms_K.max()).sqrt()
    return CodeNorms(origin_D, half_norms_K, largest, largest_rounding)


@torch.no_grad()
def nearest_code(z_ND: Tensor, codes_KD: Tensor, norms: CodeNorms | None = None) -> Tensor:
    """Indices (N,) int64 of the codes at the smallest L2 distance; ties go to the lowest index.

    Tokens and codes are fp32 or bf16. The values given are compared exactly, whatever the autocast
    and the precision that torch is told to multiply with; `code_distances` says what a tie is.
    Beyond inputs and result, memory is that of a tile. Where `z` is not finite the index means
    nothing, but is one of the codebook. `norms` are those of `code_norms(codes_KD)`, which whoever
    searches the same codes again need not compute again.

    It reads from the device at each tile; `nearest_code_triton` does not.
    """
    norms = norms or code_norms(codes_KD)
    index_N = torch.zeros(len(z_ND), dtype=torch.int64, device=z_ND.device)
    with torch.autocast(z_ND.device.type, enabled=False):
        for first in range(0, len(z_ND), TILE_TOKENS):
            tile = slice(first, first + TILE_TOKENS)
            index_N[tile] = _search_tile(z_ND[tile], codes_KD, norms)
    return index_N


def error_bound(norm_n: Tensor, norms: CodeNorms, dimensions: int, additions: int) -> Tensor:
    """The error (n,) of scores that are summed in fp32, from |z - origin| of each token.

    `additions` are those that a product goes through at most: the dimensions, where all is one
    sum. By the inequality of Cauchy and Schwarz: the products sum to |z| |c| at most, signs left
    out. What is too small for fp32 comes on top, for a machine may take it for 0; and by how much
    the score of a code that ties in float64 is larger.
    """
    relative = (additions + FEW_TERMS) * ROUNDING_OF_A_TERM * MARGIN
    largest = norms.largest + TINY  # 0 times infinity would be nan
    reach_n = norm_n + largest
    bound_n = relative * largest * reach_n + dimensions * TINY * (1 + reach_n)
    return bound_n + (SAME - 1) / 4 * reach_n.square()


def _search_tile(z_nD: Tensor, codes_KD: Tensor, norms: CodeNorms) -> Tensor:
    """Indices (n,) of the nearest codes of a tile of tokens."""
    index_n = torch.zeros(len(z_nD), dtype=torch.int64, device=z_nD.device)
    left_n, tokens_nD = torch.arange(len(z_nD), device=z_nD.device), z_nD
    device_type = z_nD.device.type
    for dtype in _screening_dtypes(device_type, _rounds_fp32(device_type)):
        candidates, is_crowded_n = _screen(tokens_nD, codes_KD, norms, dtype)
        index_n[left_n] = _settle(tokens_nD, codes_KD, candidates)
        left_n = left_n[is_crowded_n & tokens_nD.isfinite().all(1)]
        if not len(left_n):
            return index_n
        tokens_nD = z_nD[left_n]
    index_n[left_n] = search_in_float64(tokens_nD, codes_KD)
    return index_n


@functools.cache
def _screening_dtypes(device_type: str, rounds_fp32: bool) -> tuple[torch.dtype, ...]:
    """In which to screen, one after the other: bf16 first, where the machine multiplies it faster.

    Where torch is told to round fp32 in matrix products, they are no better than those in bf16.
    """
    if rounds_fp32:
        return (torch.bfloat16,)
    if device_type == "cpu":
        known = torch.cpu.get_capabilities()
        if not (known.get("avx512_bf16") or known.get("amx_bf16")):
            return (torch.float32,)
    return (torch.bfloat16, torch.float32)


def _rounds_fp32(device_type: str) -> bool:
    """Whether torch is told to round fp32 in matrix products, by either switch or oneDNN's own.

    That is a variable of two names, which on CPUs of ARM is the usual way to ask for it.
    """
    names = ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE")
    if device_type == "cpu" and any(os.environ.get(n, "").upper() in ROUNDING_MODES for n in names):
        return True
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision not in ("none", "ieee")


def _screen(z_nD: Tensor, codes_KD: Tensor, norms: CodeNorms, dtype: torch.dtype) -> Found:
    """Score all codes in `dtype`, tile by tile, and find which may be nearest.

    An error is within the bound as soon as the score is known, so a bound that grows with the
    products seen so far will do.
    """
    moved_nD = z_nD.float() - norms.origin_D
    rounded_nD = moved_nD.to(dtype)
    norm_n, rounding_n = moved_nD.norm(dim=1), (moved_nD - rounded_nD).norm(dim=1)
    del moved_nD
    dimensions = z_nD.shape[1]
    bound_n = error_bound(norm_n, norms, dimensions, dimensions)
    if dtype == torch.bfloat16:
        # With z = z' + r and c = c' + s, primes for bf16: <z, c> - <z', c'> = <z, s> + <r, c'>.
        rounding = norms.largest_rounding + TINY
        rounding_n = norm_n * rounding + rounding_n * (norms.largest + rounding)
        bound_n = bound_n + MARGIN * rounding_n
    near = NearCodes(len(z_nD), z_nD.device)
    largest_n = torch.zeros_like(norm_n)
    for first in range(0, len(codes_KD), TILE_CODES):
        tile = slice(first, first + TILE_CODES)
        products_nk = _products(rounded_nD, codes_KD[tile], norms.origin_D)
        if products_nk.dtype == torch.bfloat16:  # each of them was rounded once
            largest_n = torch.maximum(largest_n, products_nk.abs().amax(1))
        scores_nk = _subtract(norms.half_norms_K[tile], products_nk)
        del products_nk  # before the next ones are made
        near.add(scores_nk, first, 2 * (bound_n + MARGIN * ROUNDING_TO_BFLOAT16 * largest_n))
        del scores_nk
    return near.found()


def _products(rounded_nD: Tensor, codes_kD: Tensor, origin_D: Tensor) -> Tensor:
    """Of tokens and the codes of a tile (n, k), both moved and in the dtype of the tokens.

    In fp32 on a GPU: cuBLAS may add up partial sums that it has rounded to bf16, each of which may
    be far larger than the sum.
    """
    moved_Dk = (codes_kD.float() - origin_D).to(rounded_nD.dtype).T
    if rounded_nD.is_cuda and rounded_nD.dtype == torch.bfloat16:
        return torch.mm(rounded_nD, moved_Dk, out_dtype=torch.float32)
    return rounded_nD @ moved_Dk


def _subtract(half_norms_k: Tensor, products_nk: Tensor) -> Tensor:
    """The scores, fp32, in the place of products that are."""
    in_place = {"out": products_nk} if products_nk.dtype == torch.float32 else {}
    return torch.sub(half_norms_k, products_nk, **in_place)


def _settle(z_nD: Tensor, codes_KD: Tensor, candidates: Pairs) -> Tensor:
    """Indices (n,) of the nearest of the candidates; 0 where a token has none."""
    token_P, code_P, _ = candidates
    is_tied_P = (candidates.per_token(len(z_nD)) > 1)[token_P]
    distance_P = torch.zeros(len(token_P), dtype=torch.float64, device=z_nD.device)
    tied = candidates.where(is_tied_P)
    distance_P[is_tied_P] = pair_distances(z_nD, codes_KD, tied.token_P, tied.code_P)
    return nearest_of_pairs(distance_P, token_P, code_P, len(z_nD))
