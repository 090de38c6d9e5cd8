"""The search for the nearest codes on a GPU: the kernel beside a matrix product, and a matrix.

In bf16, as in training. The matrix product of tokens and codes is the least that a search by
matrix products can take; the materialising search keeps its result and looks for the smallest.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from vqrae_ds.benchmarks.simvq_peers import Sizes
from vqrae_ds.benchmarks.table import Row
from vqrae_ds.ops.nearest_code import code_norms

NUM_TOKENS = 16384
CALLS = 20
ALLOWED_MB = 2


def measure_search(sizes: Sizes) -> list[Row]:
    """Rows of the kernel on the current GPU; the norms of the codes are there, as in training."""
    from vqrae_ds.ops.nearest_code_triton import nearest_code  # imports Triton

    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    z_ND, codes_KD = (
        torch.randn(rows, sizes.dim, device=device, generator=generator).bfloat16()
        for rows in (NUM_TOKENS, sizes.num_codes)
    )
    norms = code_norms(codes_KD)

    def materialising() -> Tensor:
        return (norms.half_norms_K - z_ND @ codes_KD.T).argmin(1)

    ours, extra = _cost(lambda: nearest_code(z_ND, codes_KD, norms))
    product, _ = _cost(lambda: z_ND @ codes_KD.T)
    matrix, _ = _cost(materialising)
    return [
        Row(f"gpu_search_n{NUM_TOKENS}", ours, product, "matrix product", "ms"),
        Row(f"gpu_search_and_matrix_n{NUM_TOKENS}", ours, matrix, "materialising search", "ms"),
        Row(f"gpu_extra_memory_n{NUM_TOKENS}", extra, ALLOWED_MB, "allowed", "MB"),
    ]


def _cost(call: Callable[[], Tensor]) -> tuple[float, float]:
    """Median milliseconds of a call, and the MB that it takes at most beyond its result."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - result.nbytes
    times = []
    for _ in range(CALLS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times), extra / 1e6
