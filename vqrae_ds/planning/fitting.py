"""Which GPUs a run fits on, how many of them it needs, and the table over numbers of GPUs.

A run fits where its predicted peak and a reserve do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from vqrae_ds.config.deepspeed_json import get
from vqrae_ds.planning.parts import Plan
from vqrae_ds.planning.peak import host_bytes, peak_bytes
from vqrae_ds.planning.states import GB, is_offloaded, state_bytes
from vqrae_ds.planning.traffic import step_traffic
from vqrae_ds.planning.work import Speed, work
from vqrae_ds.text_table import columns

# For the CUDA context, NCCL's buffers, workspaces of kernels and fragmentation: an assumption.
RESERVE = 3 * GB
MEMORIES = (40, 80, 141)  # GB: A100, A100 and H100, H200


class Fit(NamedTuple):
    """The smallest number of GPUs of a size on which a run fits, and its peak there in bytes."""

    gpus: int
    peak: float


def fits(plan: Plan, gpus: int, gpu_memory: float) -> bool:
    """Whether peak and reserve are within `gpu_memory` GB."""
    return peak_bytes(plan, gpus).total + RESERVE <= gpu_memory * GB


def possible_gpus(plan: Plan) -> list[int]:
    """Numbers of GPUs that the batch can be divided by, in nodes of hpZ where it is used."""
    batch = plan.run.schedule.batch
    micro_batches = batch.global_batch // batch.micro_batch
    node = get(plan.run.deepspeed, "zero_optimization.zero_hpz_partition_size") or 1
    groups = (n for n in range(1, micro_batches + 1) if micro_batches % n == 0)
    numbers = [n * plan.tensor_size for n in groups]
    return [gpus for gpus in numbers if gpus % node == 0]


def smallest_fit(plan: Plan, gpu_memory: float) -> Fit | None:
    """The fewest GPUs of `gpu_memory` GB on which the run fits, or None where no number does."""
    for gpus in possible_gpus(plan):
        if fits(plan, gpus, gpu_memory):
            return Fit(gpus, peak_bytes(plan, gpus).total)
    return None


def describe_fits(plan: Plan, gpus: int, gpu_memory: float) -> list[str]:
    """Lines: for `gpu_memory` and each usual size in GB whether the run fits; how few would do."""
    lines, host = [], ""
    if is_offloaded(plan.run.deepspeed):
        host = f" and {host_bytes(plan) / GB:.1f} GB of the hosts' memory for the optimizer"
    for memory in _sizes(gpu_memory):
        verb = "fits" if fits(plan, gpus, memory) else "does not fit"
        least = smallest_fit(plan, memory)
        few = "no number of them is enough"
        if least is not None:
            number = "1 is" if least.gpus == 1 else f"{least.gpus} are"
            few = f"{number} enough, at a peak of {least.peak / GB:.1f} GB{host}"
        lines.append(f"{memory:g} GB a GPU: {verb} on {gpus}; {few}")
    return lines


def describe_sweep(plans: Sequence[Plan], speed: Speed | None, gpu_memory: float) -> str:
    """A table with a row for each plan of one run, at the number of GPUs it was read for.

    It has a column for GPUs of `gpu_memory` GB and of each usual size. A step takes the longer one
    of its FLOPs and its links, that to the host included. Where the optimizer is in the hosts'
    memory it takes "hosts GB" of it in all, and its update "host s" more. Without `speed` there are
    no times.
    """
    memories, on_hosts = _sizes(gpu_memory), is_offloaded(plans[0].run.deepspeed)
    head = ["GPUs", "accumulated", "states GB", "peak GB", *(f"{m:g} GB" for m in memories)]
    head += ["hosts GB"] * on_hosts
    head += ["received GB a step"]
    if speed is not None:
        head += ["FLOPs s", "links s", *(["host s"] * on_hosts), "days", "GPU-hours"]
    rows = [head]
    for plan in plans:
        gpus = plan.run.schedule.batch.world_size
        row = [f"{gpus}", f"{plan.run.schedule.batch.accumulation}"]
        row += [f"{sum(state_bytes(plan, gpus)) / GB:.2f}"]
        row += [f"{peak_bytes(plan, gpus).total / GB:.2f}"]
        row += ["fits" if fits(plan, gpus, memory) else "no" for memory in memories]
        row += [f"{host_bytes(plan) / GB:.1f}"] * on_hosts
        row += [f"{sum(t.size for t in step_traffic(plan, gpus)) / GB:,.1f}"]
        if speed is not None:
            done = work(plan, gpus, speed)
            links = max(done.traffic_seconds, done.offload.beside)
            row += [f"{done.mfu_seconds:,.2f}", f"{links:,.2f}"]
            row += [f"{done.offload.after:,.2f}"] * on_hosts
            row += [f"{done.days:,.1f}", f"{done.gpu_hours:,.0f}"]
        rows.append(row)
    return "\n".join(columns(rows, ">" * len(head)))


def _sizes(gpu_memory: float) -> list[float]:
    """GB of a GPU, in order: the usual ones and the given one."""
    return sorted({*MEMORIES, gpu_memory})
