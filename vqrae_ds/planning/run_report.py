"""The rest of the plan in words: hosts, disk, communication, time, and a setting to take."""

from __future__ import annotations

from vqrae_ds.planning.advice import recommend
from vqrae_ds.planning.fitting import RESERVE, describe_fits
from vqrae_ds.planning.offload import step_offload
from vqrae_ds.planning.parts import Plan
from vqrae_ds.planning.states import GB, is_offloaded
from vqrae_ds.planning.storage import disk_bytes, host_memory
from vqrae_ds.planning.traffic import Bandwidth, Traffic, step_traffic
from vqrae_ds.planning.work import Speed, Work, work
from vqrae_ds.text_table import columns


def describe_run(plan: Plan, gpus: int, gpu_memory: float, speed: Speed | None) -> str:
    """Lines on everything but the memory of a GPU; without `speed` none about time.

    `gpu_memory`, in GB, is that of the recommended setting, and one of those that may fit.
    """
    lines = [*_fits(plan, gpus, gpu_memory), "", *_storage(plan, gpus), "", *_traffic(plan, gpus)]
    if speed is None:
        lines += ["", "time: not planned without --peak-tflops, for the run is not in bf16"]
    else:
        lines += ["", *_work(plan, gpus, speed), "", *_advice(plan, gpus, gpu_memory, speed)]
    return "\n".join(lines)


def _fits(plan: Plan, gpus: int, gpu_memory: float) -> list[str]:
    head = f"what fits, with a reserve of {RESERVE / GB:g} GB:"
    return [head, *describe_fits(plan, gpus, gpu_memory)]


def _storage(plan: Plan, gpus: int) -> list[str]:
    host, disk = host_memory(plan, gpus), disk_bytes(plan)
    parts = [f"{host.images / GB:.2f} images ahead", f"{host.saving / GB:.2f} while saving"]
    if is_offloaded(plan.run.deepspeed):
        parts.insert(0, f"{host.optimizer / GB:.2f} optimizer")
    copies = f"{disk.number} of {disk.checkpoint / GB:.2f} GB"
    frozen = f" and {disk.pretrained / GB:.2f} GB of frozen weights" if disk.pretrained else ""
    return [
        f"memory of a host: {host.node / GB:.1f} GB for {host.ranks} ranks beside their libraries; "
        f"GB a rank: {' + '.join(parts)}",
        f"disk for checkpoints: {disk.total / GB:,.1f} GB: {copies}{frozen}",
    ]


def _traffic(plan: Plan, gpus: int) -> list[str]:
    traffic = step_traffic(plan, gpus)
    if not traffic:
        return ["communication: none"]
    rows = [("received by a GPU in a step", "GB", "")]
    rows += [(t.kind, f"{t.size / GB:,.2f}", _source(t)) for t in traffic]
    rows.append(("total", f"{sum(t.size for t in traffic) / GB:,.2f}", ""))
    return columns(rows, "<>")


def _source(traffic: Traffic) -> str:
    network = f", {traffic.network / GB:,.2f} of it through its port of the network"
    return f"among {traffic.over} GPUs" + (network if traffic.network else "")


def _work(plan: Plan, gpus: int, speed: Speed) -> list[str]:
    done, band = work(plan, gpus, speed), speed.bandwidth
    batch = plan.run.schedule.batch.global_batch
    lines = [
        f"FLOPs of a step: {done.flops / 1e15:,.2f} PFLOP, {done.flops / batch / 1e12:.3g} TFLOP "
        f"an image; checkpointing computes {done.recomputed / 1e15:,.2f} PFLOP again",
        f"they take {done.mfu_seconds:,.2f} s on {gpus} GPUs at an MFU of {speed.mfu:.0%} of "
        f"{speed.peak_tflops:g} TFLOP/s",
    ]
    if done.repeated:
        lines.insert(
            1,
            f"the ranks of tensor-parallel groups repeat {done.repeated / 1e15:,.2f} PFLOP more, "
            "which an MFU does not count: a run shows "
            f"{speed.mfu * done.flops / (done.flops + done.repeated):.1%}",
        )
    if done.traffic_seconds:
        verb = "can hide behind them"
        if done.traffic_seconds > done.mfu_seconds:
            longest = done.traffic_seconds >= done.offload.beside
            verb = "is longer, so the step takes that" if longest else "is longer"
        lines.append(
            f"communication takes {done.traffic_seconds:,.2f} s at {band.node / GB:g} GB/s in a "
            f"node and {band.network / GB:g} a port between nodes: it {verb}"
        )
    lines += _offload(plan, gpus, done, band)
    return [
        *lines,
        f"the schedule at {batch / done.step_seconds:,.1f} images a second: {done.steps:,} steps, "
        f"{done.images / 1e6:,.1f} million images, {done.days:,.1f} days, {done.gpu_hours:,.0f} "
        "GPU-hours",
    ]


def _offload(plan: Plan, gpus: int, done: Work, band: Bandwidth) -> list[str]:
    moved, (beside, after) = step_offload(plan, gpus), done.offload
    if moved is None:
        return []
    hidden = beside <= max(done.mfu_seconds, done.traffic_seconds)
    verb = "can hide behind the rest" if hidden else "is longer, so the step takes that"
    return [
        f"offload: gradients between a GPU and its host, {moved.gradients / GB:,.1f} GB in "
        f"{beside:,.2f} s at {band.bus / GB:g} GB/s: it {verb}",
        f"then the step waits {after:,.2f} s for the update: {moved.update / GB:,.1f} GB in a "
        f"node's memory at {band.host_memory / GB:g} GB/s, and {moved.weights / GB:,.1f} GB to a "
        "GPU; not planned: the speed of the host's cores, which may be what it waits for",
    ]


def _advice(plan: Plan, gpus: int, gpu_memory: float, speed: Speed) -> list[str]:
    best = recommend(plan, gpus, gpu_memory, speed)
    if best is None:
        return [f"recommended: nothing fits on {gpus} GPUs of {gpu_memory:g} GB; take more"]
    return [
        f"recommended on {gpus} GPUs of {gpu_memory:g} GB: peak {best.peak / GB:.1f} GB, a step "
        f"some {best.seconds:,.2f} s by a rough model of its time",
        "  " + " ".join(best.overrides),
    ]
