"""How fast a run is: time, images, model FLOPs and their share of the peak, memory."""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from vqrae_ds.config import Run
from vqrae_ds.monitoring.flops import flops_per_image

# TFLOP/s of one GPU in bf16, dense, by a part of its name: the first that fits. From NVIDIA's data
# sheets of A100, H100, H200 and of the Blackwell systems; most of them print it with sparsity,
# which is twice as much.
PEAK_TFLOPS = (
    ("A100", 312.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("GB200", 2500.0),
    ("B200", 2250.0),
)


class RankFigures(NamedTuple):
    """What each rank measures for itself."""

    peak_memory_gb: float
    data_seconds: float  # spent waiting for batches since the last logged step


class Throughput:
    """A clock of the training steps, from `step` on, that can stand still."""

    def __init__(self, run: Run, step: int) -> None:
        self._batch = run.schedule.batch
        self._flops_per_image = flops_per_image(run)
        self._peak_tflops = peak_tflops(run)
        self._time, self._step = time.monotonic(), step
        self._paused_seconds = self._waiting_seconds = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        start = time.monotonic()
        yield
        self._paused_seconds += time.monotonic() - start

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """What happens inside is training time that the data costs."""
        start = time.monotonic()
        yield
        self._waiting_seconds += time.monotonic() - start

    def of_this_rank(self, device: torch.device) -> RankFigures:
        """The figures of this rank, which trains on `device`."""
        return RankFigures(peak_memory_gb(device), self._waiting_seconds)

    def restart(self, step: int, slowest: RankFigures) -> dict[str, float]:
        """Figures of the steps since the last call, up to `step`; the clock starts anew.

        `slowest` holds the largest figures of all ranks: the one that waits holds up the others.
        """
        now = time.monotonic()
        steps = max(step - self._step, 1)
        seconds = max(now - self._time - self._paused_seconds, 1e-9)
        self._time, self._step = now, step
        self._paused_seconds = self._waiting_seconds = 0.0
        images_per_second = steps * self._batch.global_batch / seconds
        per_gpu = images_per_second / self._batch.world_size
        tflops = per_gpu * self._flops_per_image / 1e12
        figures = {
            "perf/seconds_per_step": seconds / steps,
            "perf/data_seconds": slowest.data_seconds / steps,
            "perf/images_per_second": images_per_second,
            "perf/images_per_second_per_gpu": per_gpu,
            "perf/tflops_per_gpu": tflops,
            "perf/peak_memory_gb": slowest.peak_memory_gb,
        }
        if self._peak_tflops is not None:
            figures["perf/mfu"] = tflops / self._peak_tflops
        return figures


def peak_tflops(run: Run) -> float | None:
    """Peak of one GPU in TFLOP/s: the configuration's, else by its name, in bf16 alone."""
    if run.config.monitor.peak_tflops is not None:
        return run.config.monitor.peak_tflops
    if not (run.bf16 and torch.cuda.is_available()):
        return None
    return peak_by_name(torch.cuda.get_device_name())


def peak_by_name(name: str) -> float | None:
    """Peak in dense bf16 TFLOP/s of the GPU of this name, or None for one that is not known."""
    return next((peak for part, peak in PEAK_TFLOPS if part in name), None)


def peak_memory_gb(device: torch.device) -> float:
    """The most memory that this process had so far, in 10^9 bytes: of its GPU, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): kilobytes on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
