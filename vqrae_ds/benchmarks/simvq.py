"""What SimVQ costs beside two others, forward and backward: time, memory, and the right codes.

The peers are vector-quantize-pytorch's SimVQ, its rotation trick off, and the textbook version; a
row compares with the better of the two. The three take turns in one process, with two threads, so
that a busy minute is one for all; times are medians. Memory is that of a process that takes two
steps over that of one that builds the same and takes none, so gradients are in it.

`accumulation_reuse` compares ours with itself: four micro steps that project the codes once, as the
trainer does, against four that project them each time. Ours must find the codes that a float64
search of all distances finds. Another one counts as a tie where its distance is larger by no more
than fp32 keeps of a distance of that size, 2^-24 of it, both summed in float64 from differences.

Where there is a GPU the rows of `simvq_gpu` follow.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vqrae_ds.benchmarks.convert import measure
from vqrae_ds.benchmarks.launch import choose_machine
from vqrae_ds.benchmarks.simvq_peers import OURS, PEERS, Quantize, Sizes, make, take_step, tokens
from vqrae_ds.benchmarks.table import Report, Row, describe_machine
from vqrae_ds.models.simvq import SimVQ

NUM_TOKENS = (1024, 4096)
REUSE_TOKENS, MICRO_STEPS = 1024, 4
MEMORY_STEPS = 2
THREADS = 2
TILE = 256  # tokens that the float64 search takes at once
KEPT_OF_A_DISTANCE = 2.0**-24


class Mistakes(NamedTuple):
    """Tokens whose code is another one than float64's: as near as fp32 can tell, or further."""

    ties: int
    wrong: int


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
        for number in NUM_TOKENS:
            row, times = _compare_times(number, rounds, sizes)
            rows.append(row)
            details[row.metric] = times
        row, details["accumulation_reuse"] = _compare_reuse(rounds, sizes)
        memory_row, details["memory"] = _compare_memory(NUM_TOKENS[-1], sizes)
        rows += [memory_row, row]
        for number in NUM_TOKENS:
            mistakes = _mistakes_of_ours(number, sizes)
            rows.append(Row(f"wrong_codes_n{number}", mistakes.wrong, 0, "allowed", "tokens"))
            details[f"proven_ties_n{number}"] = mistakes.ties
    finally:
        torch.set_num_threads(threads)
    machine = choose_machine()
    if machine.device_type == "cuda":
        from vqrae_ds.benchmarks.simvq_gpu import measure_search

        rows += measure_search(sizes)
    return Report("simvq", describe_machine(machine.device_type), rows, details)


def _compare_times(number: int, rounds: int, sizes: Sizes) -> tuple[Row, dict[str, Any]]:
    z_1ND = tokens(number, sizes.dim)
    quantizers = {name: make(name, sizes) for name in (OURS, *PEERS)}
    steps = {n: _step_of(quantizer, z_1ND) for n, quantizer in quantizers.items()}
    seconds = take_turns(steps, rounds)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    peer = min(PEERS, key=medians.__getitem__)
    row = Row(f"time_n{number}", 1e3 * medians[OURS], 1e3 * medians[peer], peer, "ms")
    return row, {n: [round(1e3 * s, 1) for s in times] for n, times in seconds.items()}


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
    torch.manual_seed(0)
    z_1ND, simvq = tokens(REUSE_TOKENS, sizes.dim), SimVQ(*sizes)
    reusing = SimVQ(*sizes)
    reusing.load_state_dict(simvq.state_dict())
    reusing.keep_codes()

    def step(quantizer: SimVQ) -> None:
        quantizer.forget_codes()
        for _ in range(MICRO_STEPS):
            take_step(quantizer, z_1ND)

    seconds = take_turns({"with": lambda: step(reusing), "without": lambda: step(simvq)}, rounds)
    ours, peer = (1e3 * statistics.median(seconds[name]) for name in ("with", "without"))
    row = Row(f"accumulation_reuse_n{REUSE_TOKENS}", ours, peer, "ours without reuse", "ms")
    return row, {n: [round(1e3 * s, 1) for s in times] for n, times in seconds.items()}


def _compare_memory(number: int, sizes: Sizes) -> tuple[Row, dict[str, float]]:
    extra = {}
    for name in (OURS, *PEERS):
        idle, busy = (_peak_memory(name, number, sizes, steps) for steps in (0, MEMORY_STEPS))
        extra[name] = (busy - idle) / 1e6
    peer = min(PEERS, key=extra.__getitem__)
    row = Row(f"peak_memory_n{number}", extra[OURS], extra[peer], peer, "MB")
    return row, {name: round(value, 1) for name, value in extra.items()}


def _peak_memory(name: str, number: int, sizes: Sizes, steps: int) -> int:
    """Anonymous bytes at the peak of a process with one thread.

    Every tensor of a MB or more has pages of its own there, which are given back when it is freed:
    what the allocator would hold back for later says nothing of what is needed.
    """
    arguments = [name, *map(str, (number, *sizes, steps))]
    module = "vqrae_ds.benchmarks.simvq_peers"
    command = [sys.executable, "-m", module, *arguments]
    return measure(command, MALLOC_MMAP_THRESHOLD_=str(1 << 20)).peak_anonymous_bytes


@torch.no_grad()
def _mistakes_of_ours(number: int, sizes: Sizes) -> Mistakes:
    torch.manual_seed(0)
    simvq, z_1ND = SimVQ(*sizes), tokens(number, sizes.dim)
    index_N = simvq.find_codes(z_1ND)[0]
    return mistakes(index_N, z_1ND[0], simvq.searched_codes().codes_KD)


def mistakes(index_N: Tensor, z_ND: Tensor, codes_KD: Tensor) -> Mistakes:
    """How many of the indices (N,) are not those of a float64 search."""
    codes_KD = codes_KD.double()
    half_norms_K = codes_KD.square().sum(1) / 2
    ties = wrong = 0
    for found_n, z_nD in zip(index_N.split(TILE), z_ND.double().split(TILE), strict=True):
        expected_n = (half_norms_K - z_nD @ codes_KD.T).argmin(1)
        found, expected = (
            (z_nD - codes_KD[indices_n]).square().sum(1) for indices_n in (found_n, expected_n)
        )
        is_other_n = found_n != expected_n
        is_wrong_n = is_other_n & (found > expected * (1 + KEPT_OF_A_DISTANCE))
        wrong += int(is_wrong_n.sum())
        ties += int((is_other_n & ~is_wrong_n).sum())
    return Mistakes(ties, wrong)
