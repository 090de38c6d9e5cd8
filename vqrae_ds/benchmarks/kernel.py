"""The search for the nearest codes on a GPU: the kernel beside a matrix product, and a matrix.

In bf16, as in training. The matrix product of tokens and codes is the least that a search by
matrix products can take; the materialising search keeps its result and looks for the smallest. The
norms of the codes are computed before, as in training, which does so once a step. Memory is what a
call takes beyond its inputs and its result. The codes are compared with those of a float64 search.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vqrae_ds.benchmarks.launch import require_gpu
from vqrae_ds.benchmarks.simvq import find_mistakes
from vqrae_ds.benchmarks.simvq_peers import Sizes
from vqrae_ds.benchmarks.table import Goal, Report, Row, describe_machine, judge
from vqrae_ds.ops.code_search import obstacle_of_kernels
from vqrae_ds.ops.nearest_code import code_norms

NUM_TOKENS = 16384
ROUNDS_TO_WARM_UP = 3
ALLOWED_MB = 2
SEARCH, BESIDE_MATRIX = f"search_n{NUM_TOKENS}", f"search_and_matrix_n{NUM_TOKENS}"
MEMORY, WRONG = f"extra_memory_n{NUM_TOKENS}", f"wrong_codes_n{NUM_TOKENS}"
GOALS = {SEARCH: Goal(0, 1.15), BESIDE_MATRIX: Goal(0, 0.5), MEMORY: Goal(0, 1)}


def measure_kernel(rounds: int = 20, sizes: Sizes | None = None) -> Report:
    """Time each search `rounds` times, 2 or more, on the current GPU.

    Raises `ValueError` where there is no GPU, or none that can run the kernels.
    """
    require_gpu("the benchmark of the kernel")
    obstacle = obstacle_of_kernels(on_gpu=True)
    if obstacle is not None:
        raise ValueError(f"there is no kernel to measure: {obstacle}")
    from vqrae_ds.ops.nearest_code_triton import nearest_code  # imports Triton

    sizes = sizes or Sizes()
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    z_ND, codes_KD = (
        torch.randn(rows, sizes.dim, device=device, generator=generator).bfloat16()
        for rows in (NUM_TOKENS, sizes.num_codes)
    )
    norms = code_norms(codes_KD)
    calls = {
        "kernel": lambda: nearest_code(z_ND, codes_KD, norms),
        "product": lambda: z_ND @ codes_KD.T,
        "matrix": lambda: (norms.half_norms_K - z_ND @ codes_KD.T).argmin(1),
    }
    times = _take_turns(calls, rounds)
    median = {name: statistics.median(each) for name, each in times.items()}
    extra = {name: _extra_bytes(call) / 1e6 for name, call in calls.items()}
    mistakes = find_mistakes(calls["kernel"](), z_ND, codes_KD)
    rows = [
        Row(SEARCH, median["kernel"], median["product"], "matrix product", "ms"),
        Row(BESIDE_MATRIX, median["kernel"], median["matrix"], "materialising search", "ms"),
        Row(MEMORY, extra["kernel"], ALLOWED_MB, "allowed", "MB"),
        Row(WRONG, mistakes.wrong, 0, "allowed", "tokens"),
    ]
    details: dict[str, Any] = {
        "goals": judge(rows, GOALS),
        "milliseconds": {name: [round(ms, 4) for ms in each] for name, each in times.items()},
        "extra_megabytes": {name: round(size, 3) for name, size in extra.items()},
        "tied_codes": mistakes.tied,
    }
    return Report("kernel", describe_machine("cuda"), rows, details)


def _take_turns(calls: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call, by name; every second round goes the other way round.

    The clock of a GPU falls when it gets warm, for all of them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-ROUNDS_TO_WARM_UP, rounds):
        for name in calls if number % 2 else reversed(calls):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            calls[name]()
            end.record()
            end.synchronize()
            if number >= 0:
                times[name].append(start.elapsed_time(end))
    return times


def _extra_bytes(call: Callable[[], Tensor]) -> int:
    """What a call takes at most beyond its inputs and its result."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - result.nbytes
