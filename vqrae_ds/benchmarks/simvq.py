"""What SimVQ costs beside two others, forward and backward: time, memory, and the right codes.

The peers are vector-quantize-pytorch's SimVQ, its rotation trick off, and the textbook version; a
row compares with the better of the two, and medians. The three take turns in one process, with two
threads, so that a busy minute is one for all. Memory is what a process has at its peak, in two
steps, above what it has once all is built, so gradients are in it. It is that of the C library's
allocator as it comes, which keeps some of what is freed. Under `mmap` the details have it where
every tensor of a MB or more has pages of its own, which are given back when it is freed: what the
tensors need.

`accumulation_reuse` compares ours with itself: four micro steps that project the codes once, as the
trainer does, against four that project them each time. Ours must find the codes that a float64
search of all distances finds: `ops.code_distances` says what a tie is, and of tied codes it must be
the first. How many tokens have any is in the details.

All of it is on the CPU; `kernel` measures the search on a GPU.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqrae_ds.benchmarks.convert import measure
from vqrae_ds.benchmarks.simvq_peers import (
    OURS,
    PEERS,
    Quantize,
    Sizes,
    make,
    make_ours,
    take_step,
    tokens,
)
from vqrae_ds.benchmarks.table import Report, Row, describe_machine
from vqrae_ds.models.simvq import SimVQ
from vqrae_ds.ops.code_distances import SAME

NUM_TOKENS = (1024, 4096)
REUSE_TOKENS, MICRO_STEPS = 1024, 4
MEMORY_STEPS, MEMORY_PROCESSES = 2, 3
THREADS = 2
TILE = 128  # tokens that the float64 search takes at once
# Distances from products are good for a first look; those of the nearest are from differences.
NEAR, ROUNDING = 1 + 2.0**-20, 1e-12
ALLOCATORS = {"default": {}, "mmap": {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}}


class Mistakes(NamedTuple):
    """Tokens with several nearest codes, and tokens for which another one was found."""

    tied: int
    wrong: int


class Compared(NamedTuple):
    """Times of all three, and whether ours found the right codes."""

    row: Row
    milliseconds: dict[str, list[float]]
    mistakes: Mistakes


def measure_simvq(rounds: int = 5, sizes: Sizes | None = None) -> Report:
    """Time each of the three `rounds` times, 2 or more, measure memory, and compare the codes.

    Raises `RuntimeError` where a process that is measured fails.
    """
    sizes = sizes or Sizes()
    threads = torch.get_num_threads()
    torch.set_num_threads(min(THREADS, os.cpu_count() or 1))
    rows: list[Row] = []
    details: dict[str, Any] = {"threads": torch.get_num_threads()}
    try:
        times = {number: _compare_times(number, rounds, sizes) for number in NUM_TOKENS}
        for row, seconds, _ in times.values():
            rows.append(row)
            details[row.metric] = seconds
        memory_row, details["memory"] = _compare_memory(NUM_TOKENS[-1], sizes)
        row, details["accumulation_reuse"] = _compare_reuse(rounds, sizes)
        rows += [memory_row, row]
        for number, (_, _, mistakes) in times.items():
            rows.append(Row(f"wrong_codes_n{number}", mistakes.wrong, 0, "allowed", "tokens"))
            details[f"tied_codes_n{number}"] = mistakes.tied
    finally:
        torch.set_num_threads(threads)
    return Report("simvq", describe_machine("cpu"), rows, details)


def _compare_times(number: int, rounds: int, sizes: Sizes) -> Compared:
    """And the mistakes of the very module that was timed."""
    z_1ND = tokens(number, sizes.dim)
    ours = make_ours(sizes)
    quantizers = {OURS: ours} | {name: make(name, sizes) for name in PEERS}
    steps = {n: _step_of(quantizer, z_1ND) for n, quantizer in quantizers.items()}
    seconds = take_turns(steps, rounds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    peer = min(PEERS, key=medians.__getitem__)
    row = Row(f"time_n{number}", 1e3 * medians[OURS], 1e3 * medians[peer], peer, "ms")
    index_N = take_step(ours, z_1ND)[0]
    mistakes = find_mistakes(index_N, z_1ND[0], ours.searched_codes().codes_KD)
    return Compared(row, _milliseconds(seconds), mistakes)


def _milliseconds(seconds: dict[str, list[float]]) -> dict[str, list[float]]:
    return {name: [round(1e3 * s, 1) for s in times] for name, times in seconds.items()}


def _step_of(quantize: Quantize, z_1ND: Tensor) -> Callable[[], Any]:
    return lambda: take_step(quantize, z_1ND)


def take_turns(steps: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, by name: one round to warm up, then `rounds` that count.

    Every second round goes the other way round, so that nobody always follows the same one.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for number in range(rounds):
        order: Iterable[str] = steps if number % 2 == 0 else reversed(steps)
        for name in order:
            start = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def _compare_reuse(rounds: int, sizes: Sizes) -> tuple[Row, dict[str, Any]]:
    """Ours with itself: the codes projected once a step, and once a micro step."""
    z_1ND = tokens(REUSE_TOKENS, sizes.dim)
    reusing, projecting = make_ours(sizes), make_ours(sizes)
    reusing.keep_codes()

    def step(quantizer: SimVQ) -> None:
        quantizer.forget_codes()
        for _ in range(MICRO_STEPS):
            take_step(quantizer, z_1ND)

    steps = {"with": lambda: step(reusing), "without": lambda: step(projecting)}
    seconds = take_turns(steps, rounds)
    ours, peer = (1e3 * statistics.median(seconds[name]) for name in steps)
    row = Row(f"accumulation_reuse_n{REUSE_TOKENS}", ours, peer, "ours without reuse", "ms")
    return row, _milliseconds(seconds)


def _compare_memory(number: int, sizes: Sizes) -> tuple[Row, dict[str, dict[str, list[float]]]]:
    """Of several processes each, for what an allocator keeps is not the same in all of them."""
    names = (OURS, *PEERS)
    megabytes: dict[str, dict[str, list[float]]] = {a: {n: [] for n in names} for a in ALLOCATORS}
    for _ in range(MEMORY_PROCESSES):
        for allocator, variables in ALLOCATORS.items():
            for name in names:
                extra = _extra_memory(name, number, sizes, variables)
                megabytes[allocator][name].append(round(extra / 1e6, 1))
    found = {name: statistics.median(each) for name, each in megabytes["default"].items()}
    peer = min(PEERS, key=found.__getitem__)
    return Row(f"peak_memory_n{number}", found[OURS], found[peer], peer, "MB"), megabytes


def _extra_memory(name: str, number: int, sizes: Sizes, variables: dict[str, str]) -> int:
    """Anonymous bytes at the peak of a process with one thread, above those once all is built."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "built"
        arguments = [name, *map(str, (number, *sizes, MEMORY_STEPS, file))]
        command = [sys.executable, "-m", "vqrae_ds.benchmarks.simvq_peers", *arguments]
        peak = measure(command, **variables).peak_anonymous_bytes
        return peak - int(file.read_text())


@torch.no_grad()
def find_mistakes(index_N: Tensor, z_ND: Tensor, codes_KD: Tensor) -> Mistakes:
    """How many of the indices (N,) are not those of a float64 search of all codes."""
    codes_KD = codes_KD.double()
    half_norms_K = codes_KD.square().sum(1) / 2
    tied = wrong = 0
    for found_n, z_nD in zip(index_N.split(TILE), z_ND.double().split(TILE), strict=True):
        sizes_n1 = z_nD.square().sum(1, keepdim=True)
        distances_nK = sizes_n1 + 2 * (half_norms_K - z_nD @ codes_KD.T)
        rounding_n1 = ROUNDING * (sizes_n1 + 2 * half_norms_K.amax())
        limit_n1 = NEAR * distances_nK.amin(1, keepdim=True) + rounding_n1
        token_P, code_P = (distances_nK <= limit_n1).nonzero(as_tuple=True)
        distance_P = (z_nD[token_P] - codes_KD[code_P]).square().sum(1)
        smallest_n = torch.full_like(distances_nK[:, 0], torch.inf)
        smallest_n.scatter_reduce_(0, token_P, distance_P, "amin")
        is_tied_P = distance_P <= SAME * smallest_n[token_P]
        token_P, code_P = token_P[is_tied_P], code_P[is_tied_P]
        first_n = torch.full_like(found_n, len(codes_KD))
        first_n.scatter_reduce_(0, token_P, code_P, "amin")
        tied += int((token_P.bincount() > 1).sum())
        wrong += int((found_n != first_n).sum())
    return Mistakes(tied, wrong)
