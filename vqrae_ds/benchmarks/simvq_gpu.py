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
ROUNDS, ROUNDS_TO_WARM_UP = 20, 3
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

    calls = {
        "ours": lambda: nearest_code(z_ND, codes_KD, norms),
        "product": lambda: z_ND @ codes_KD.T,
        "matrix": materialising,
    }
    median = _take_turns(calls)
    extra = _extra_bytes(calls["ours"]) / 1e6
    return [
        Row(f"gpu_search_n{NUM_TOKENS}", median["ours"], median["product"], "matrix product", "ms"),
        Row(
            f"gpu_search_and_matrix_n{NUM_TOKENS}",
            median["ours"],
            median["matrix"],
            "materialising search",
            "ms",
        ),
        Row(f"gpu_extra_memory_n{NUM_TOKENS}", extra, ALLOWED_MB, "allowed", "MB"),
    ]


def _take_turns(calls: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Median milliseconds of each call, by name; every second round goes the other way round.

    The clock of a GPU falls when it gets warm, for all of them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-ROUNDS_TO_WARM_UP, ROUNDS):
        for name in calls if number % 2 else reversed(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[name]()
            end.record()
            end.synchronize()
            if number >= 0:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(each) for name, each in times.items()}


def _extra_bytes(call: Callable[[], Tensor]) -> int:
    """What a call takes at most beyond its result."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - result.nbytes
