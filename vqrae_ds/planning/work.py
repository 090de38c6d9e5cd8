"""FLOPs of a step, and how long the step and the whole schedule take at a given MFU."""

from __future__ import annotations

from typing import NamedTuple

from vqrae_ds.monitoring.flops import flops_per_image, recomputed_flops, repeated_flops
from vqrae_ds.planning.offload import OffloadSeconds, offload_seconds
from vqrae_ds.planning.parts import Plan
from vqrae_ds.planning.traffic import Bandwidth, step_traffic, traffic_seconds

H100_TFLOPS = 989.0  # dense bf16, SXM; NVIDIA's data sheet prints twice as much, with sparsity


class Speed(NamedTuple):
    """What a GPU does: peak in TFLOP/s, the share of it that a step reaches, and its links.

    Without tensor parallelism `mfu` is a run's `perf/mfu`. With it what ranks of a group repeat is
    computed at this share too; `perf/mfu` counts it once, and is less.
    """

    peak_tflops: float = H100_TFLOPS
    mfu: float = 0.4
    bandwidth: Bandwidth = Bandwidth()


class Work(NamedTuple):
    """FLOPs of the model in an optimizer step of all GPUs, each counted once, and times.

    `repeated` are FLOPs that the ranks of tensor-parallel groups add to them, `recomputed` those of
    checkpointing: an MFU counts neither. `mfu_seconds` are for `flops` and `repeated`. A step takes
    the longest one of its work at the given MFU, its communication and what an offloaded optimizer
    moves meanwhile, which hide behind each other; then it waits for the update on the host.
    """

    flops: float
    repeated: float
    recomputed: float
    mfu_seconds: float
    traffic_seconds: float
    offload: OffloadSeconds
    steps: int
    gpus: int
    images: int  # of the whole schedule

    @property
    def gpu_hours(self) -> float:
        """Of the whole schedule, as `days`."""
        return self.days * 24 * self.gpus

    @property
    def step_seconds(self) -> float:
        """Of one optimizer step."""
        return max(self.mfu_seconds, self.traffic_seconds, self.offload.beside) + self.offload.after

    @property
    def days(self) -> float:
        """Of the whole schedule, without saves, validation and standstill."""
        return self.steps * self.step_seconds / 86400


def work(plan: Plan, gpus: int, speed: Speed) -> Work:
    """The work of a run on `gpus` GPUs."""
    run, batch = plan.run, plan.run.schedule.batch.global_batch
    flops, repeated = flops_per_image(run) * batch, repeated_flops(run) * batch
    steps = run.schedule.total_steps
    return Work(
        flops=flops,
        repeated=repeated,
        recomputed=recomputed_flops(run) * batch,
        mfu_seconds=(flops + repeated) / (gpus * speed.peak_tflops * 1e12 * speed.mfu),
        traffic_seconds=traffic_seconds(step_traffic(plan, gpus), speed.bandwidth),
        offload=offload_seconds(plan, gpus, speed.bandwidth),
        steps=steps,
        gpus=gpus,
        images=steps * batch,
    )
