"""The plan in words: the table of parts, the peak of a step, and whether it fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vqrae_ds.config.deepspeed_json import batch_arithmetic
from vqrae_ds.monitoring.flops import encoder_flops
from vqrae_ds.planning.fitting import RESERVE, fits, possible_gpus, smallest_fit
from vqrae_ds.planning.parts import Plan
from vqrae_ds.planning.peak import (
    Peak,
    details_of_peak,
    gathered_a_micro_step,
    host_bytes,
    peak_bytes,
)
from vqrae_ds.planning.states import (
    BF16,
    GB,
    data_gpus,
    is_offloaded,
    parameter_bytes,
    state_bytes,
    state_bytes_by_kind,
    zero_stage,
)
from vqrae_ds.text_table import columns

NOT_PLANNED = (
    "not planned, and what the reserve is for: fragmentation of the allocator, workspaces of "
    "kernels, the CUDA context and NCCL's buffers"
)

DIVIDED = {  # by ZeRO stage
    1: "masters and optimizer states",
    2: "gradients, masters and optimizer states",
    3: "all of them and the frozen parameters",
}


def describe_plan(plan: Plan, gpus: int, gpu_memory: float) -> str:
    """The table of the parts, the rows of the peak, and whether it fits into `gpu_memory` GB.

    Raises `ValueError`, as the trainer does, where the batch cannot be divided by `gpus`.
    """
    batch = batch_arithmetic(plan.run.deepspeed, gpus)
    sizes = state_bytes(plan, gpus)
    total, model = sum(sizes) / GB, plan.run.config.model
    generator = sum(
        size for part, size in zip(plan.parts, sizes, strict=True) if part.engine == "generator"
    )
    stage = zero_stage(plan.run.deepspeed)
    lines = [
        f"image:  {model.image_size} px, {model.grid_side} x {model.grid_side} = "
        f"{model.grid_side**2:,} tokens",
        f"batch:  {batch.in_words()}",
        "",
        *columns(_rows(plan, sizes), "<>><><"),
        *([plan.note] if plan.note else []),
        "",
        f"bytes a trained parameter: {_describe_bytes(plan.run.deepspeed)}",
        f"ZeRO-{stage} divides {DIVIDED[stage]} by {data_gpus(plan, gpus)}",
        *_repeated_encoder(plan, gpus),
        f"model states {total:.1f} GB of {gpu_memory:g} GB a GPU, of which the generator "
        f"{generator / GB:.1f} (GB = 10^9 bytes)",
        _by_kind(plan, gpus),
        "",
        *_peak_in_words(plan, gpus, gpu_memory),
    ]
    return "\n".join([*lines, NOT_PLANNED])


def _peak_in_words(plan: Plan, gpus: int, gpu_memory: float) -> list[str]:
    """The rows of the peak, what is gathered, what the host holds, and the verdict."""
    peak = peak_bytes(plan, gpus)
    rows = [("in a micro step", "GB a GPU", "")]
    rows += [(name, f"{size / GB:.2f}", what) for name, size, what in details_of_peak(plan, gpus)]
    rows.append(("predicted peak", f"{peak.total / GB:.2f}", ""))
    lines = [*columns(rows, "<>"), "", gathered_a_micro_step(plan, gpus)]
    if is_offloaded(plan.run.deepspeed):
        lines.append(f"host: {host_bytes(plan) / GB:.1f} GB over all ranks, for the optimizer")
    is_enough = fits(plan, gpus, gpu_memory)
    verb = "fits" if is_enough else "does not fit"
    lines.append(
        f"the peak of {peak.total / GB:.1f} GB {verb} into {gpu_memory:g} GB a GPU, of which "
        f"{RESERVE / GB:g} GB are a reserve"
    )
    return lines if is_enough else [*lines, _way_out(plan, peak, gpu_memory)]


def _by_kind(plan: Plan, gpus: int) -> str:
    kinds = state_bytes_by_kind(plan, gpus)
    return (
        f"by kind: parameters {kinds.parameters / GB:.2f}, gradients {kinds.gradients / GB:.2f}, "
        f"masters and moments {kinds.optimizer / GB:.2f} GB"
    )


def _repeated_encoder(plan: Plan, gpus: int) -> list[str]:
    """What it costs that every rank of a tensor-parallel group has the encoder, and runs it."""
    size = plan.tensor_size
    if size == 1:
        return []
    once = encoder_flops(plan.run) / 1e12
    here = state_bytes(plan, gpus)
    without = state_bytes(plan, gpus, tensor_size=1)
    encoders = sum(
        with_tp - alone
        for part, with_tp, alone in zip(plan.parts, here, without, strict=True)
        if part.name in ("encoder", "teacher") and part.engine == "generator"
    )
    return [
        f"tensor parallelism: decoder and codebook are divided by {size} as well; every rank of a "
        f"group has the encoder, and runs it: {once:.3g} TFLOP a pass and image {size} times, and "
        f"{encoders / GB:.2f} GB a GPU more than without; the decoder's activations are planned "
        "as if they were not divided"
    ]


def _rows(plan: Plan, sizes: list[float]) -> list[tuple[str, ...]]:
    """The cells of the table, its head and its total included."""
    rows = [("part", "count", "million", "", "GB a GPU", "what it is")]
    for part, size in zip(plan.parts, sizes, strict=True):
        numbers = (f"{part.count:,}", f"{part.count / 1e6:,.2f}", part.kind, f"{size / GB:.2f}")
        rows.append((part.name, *numbers, part.what))
    trained, frozen = plan.count("trained"), plan.count("frozen")
    count, what = trained + frozen, f"{trained:,} trained + {frozen:,} frozen"
    numbers = (f"{count:,}", f"{count / 1e6:,.2f}", "", f"{sum(sizes) / GB:.2f}")
    return [*rows, ("total", *numbers, what)]


def _describe_bytes(deepspeed: Mapping[str, Any]) -> str:
    size = parameter_bytes(deepspeed, zero_stage(deepspeed))
    parts = (
        f"{size.parameter} itself",
        f"{size.gradient} gradient",
        f"{size.master} {'bf16' if size.master == BF16 else 'fp32'} master",
        f"{size.optimizer} {deepspeed['optimizer']['type']}",
    )
    return f"{' + '.join(parts)} = {sum(size)}, a frozen one {size.parameter}"


def _way_out(plan: Plan, peak: Peak, gpu_memory: float) -> str:
    """The smallest number of GPUs that the batch can be divided by and the peak fits on."""
    least = smallest_fit(plan, gpu_memory)
    if least is not None:
        return f"it fits from {least.gpus} GPUs on: {least.peak / GB:.1f} GB a GPU"
    most = possible_gpus(plan)[-1]
    size = peak_bytes(plan, most).total / GB
    largest = "activations" if peak.activations > peak.states else "model states"
    return (
        f"it does not fit on any number of GPUs up to {most}, where it is {size:.1f} GB a GPU. "
        f"Most of it are {largest}: a smaller micro batch, memory.*_checkpointing: full and "
        "another DeepSpeed JSON take less"
    )
