"""The most that a step takes on one GPU: states, gathered weights, buckets, activations.

The arithmetic of ZeRO's buffers is that of deepspeed 0.19.8; what the JSON leaves out has the
default of its runtime/zero/config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vqrae_ds.config.deepspeed_json import for_discriminator, get
from vqrae_ds.planning.activations import activations, value_size
from vqrae_ds.planning.parts import Plan
from vqrae_ds.planning.states import (
    FP32,
    GB,
    data_gpus,
    is_offloaded,
    parameter_bytes,
    state_bytes,
    zero_stage,
)

DEFAULTS = {
    "reduce_bucket_size": 5e8,
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "sub_group_size": 1e9,
    "contiguous_gradients": True,
    "memory_efficient_linear": True,
    "zero_hpz_partition_size": 1,
}


class Peak(NamedTuple):
    """Bytes on one GPU.

    `total` is states and average, and the larger of what a micro step and the optimizer's step add.
    """

    states: float
    ema: float  # the moving average of the weights
    gathered: float  # weights that ZeRO-3 holds whole for a while
    buckets: float  # of gradients on their way to the ranks
    activations: float
    optimizer_step: float  # temporaries of the update
    total: float


class Row(NamedTuple):
    """A line of what the peak is made of, in bytes."""

    name: str
    size: float
    what: str


def peak_bytes(plan: Plan, gpus: int) -> Peak:
    """The predicted peak of a step on each of `gpus` GPUs, one rank on each."""
    states = sum(state_bytes(plan, gpus))
    ema = 0.0 if is_offloaded(plan.run.deepspeed) else _average_bytes(plan) / data_gpus(plan, gpus)
    micro_step = (gathered_bytes(plan), bucket_bytes(plan), activations(plan.run).most)
    update = update_bytes(plan, gpus)
    total = states + ema + max(sum(micro_step), update)
    return Peak(states, ema, *micro_step, update, total)


def update_bytes(plan: Plan, gpus: int) -> float:
    """Temporaries of the update: two vectors like the largest one that is stepped at once.

    That is the share of a part of the model, under ZeRO-3 of `sub_group_size` elements at most. An
    optimizer in the host's memory takes none of a GPU.
    """
    deepspeed = plan.run.deepspeed
    if is_offloaded(deepspeed):
        return 0.0
    stage = zero_stage(deepspeed)
    trained = [p.held for p in plan.parts if p.engine == "generator" and p.kind == "trained"]
    largest = max(trained) / data_gpus(plan, gpus)
    if stage == 3:
        largest = min(largest, option(deepspeed, "sub_group_size"))
    return 2 * largest * parameter_bytes(deepspeed, stage).master


def host_bytes(plan: Plan) -> float:
    """Bytes in the memory of all hosts together: what `offload_optimizer` takes off the GPUs.

    Gradients, masters and optimizer states of the generator, and the average of its weights. The
    gradients are there twice: summed up, and as the optimizer takes them.
    """
    if not is_offloaded(plan.run.deepspeed):
        return 0.0
    deepspeed = plan.run.deepspeed
    size = parameter_bytes(deepspeed, zero_stage(deepspeed))
    trained = _trained(plan)
    values = trained * (2 * size.gradient + size.master + size.optimizer) + _average_bytes(plan)
    return plan.tensor_size * values


def gathered_bytes(plan: Plan) -> float:
    """Weights that ZeRO-3 holds whole at once, in the dtype of the parameters; else 0.

    A weight is released after its use, unless it is used again within `stage3_max_reuse_distance`
    elements. So where the forward pass turns into the backward pass the last half of that distance
    stays, and anywhere else the largest block at least. Beside it the next weights are fetched:
    `stage3_prefetch_bucket_size` elements, as far as `stage3_max_live_parameters` allows, which
    limits nothing else. Weights below the persistence threshold are always whole. DeepSpeed's
    memory-efficient linear layer does not hold the weight for its backward pass; PyTorch's does, so
    that without it what trains and is not checkpointed stays whole from forward to backward.
    """
    run = plan.run
    if zero_stage(run.deepspeed) != 3:
        return 0.0
    held = min(
        max(plan.largest_block, option(run.deepspeed, "stage3_max_reuse_distance") / 2),
        _in_engine(plan),
    )
    if not option(run.deepspeed, "memory_efficient_linear"):
        memory = run.config.memory
        policies = {
            "encoder": memory.encoder_checkpointing,
            "decoder": memory.decoder_checkpointing,
        }
        whole = sum(
            part.held
            for part in plan.parts
            if part.kind == "trained" and policies.get(part.name) == "none"
        )
        held = max(held, whole)
    room = max(option(run.deepspeed, "stage3_max_live_parameters") - held, 0)
    ahead = min(room, option(run.deepspeed, "stage3_prefetch_bucket_size"))
    values = min(held + ahead, _in_engine(plan)) + plan.persistent
    return values * value_size(run)


def bucket_bytes(plan: Plan) -> float:
    """Buffers through which gradients go to the ranks, in the dtype that they are reduced in.

    With `contiguous_gradients` a bucket is a buffer of `reduce_bucket_size` elements. ZeRO-3 has
    one, and copies it in the order of the ranks to reduce it; that copy is no larger than the
    gradients of a micro step. ZeRO-1 and 2 have a second one with `overlap_comm`. ZeRO-1 in bf16
    with gradients in fp32 has none. The discriminator's engine holds its bucket while it is
    trained.
    """
    deepspeed = plan.run.deepspeed
    total = _buckets(deepspeed, value_size(plan.run), _trained(plan))
    gan = next((part for part in plan.parts if part.engine == "discriminator"), None)
    if gan is not None:
        total += _buckets(for_discriminator(deepspeed), value_size(plan.run), gan.count)
    return total


def details_of_peak(plan: Plan, gpus: int) -> list[Row]:
    """What the peak is made of, by name; the activations by part, which do not all coincide."""
    peak, parts = peak_bytes(plan, gpus), activations(plan.run)
    where = "in the host's memory" if is_offloaded(plan.run.deepspeed) else "4 bytes / GPUs"
    rows = [Row("model states", peak.states, "the table above")]
    if plan.run.config.ema is not None:
        rows.append(Row("moving average", peak.ema, where))
    rows += [
        Row("gathered weights", peak.gathered, "ZeRO-3: in use, and fetched ahead"),
        Row("buckets", peak.buckets, "gradients on their way"),
        Row("activations", peak.activations, "the most at once:"),
    ]
    rows += [Row(f"  {name}", size, "kept") for name, size in parts.kept.items()]
    rows += [Row(f"  {name}", size, "one of these") for name, size in parts.passing.items()]
    if "discriminator" in parts.passing:
        what = "without what is kept but the codes"
        rows.append(Row("  discriminator's own step", parts.after, what))
    rows.append(Row("optimizer's step", peak.optimizer_step, "when the micro steps are over"))
    return rows


def gathered_a_micro_step(plan: Plan, gpus: int) -> str:
    """Bytes of a frozen encoder or teacher that a GPU gathers in each micro step, in words."""
    frozen = [p for p in plan.parts if p.name in ("encoder", "teacher") and p.kind == "frozen"]
    if zero_stage(plan.run.deepspeed) != 3:
        return "gathered in a micro step: nothing, weights are whole below ZeRO-3"
    if not frozen:
        return "gathered in a micro step: nothing frozen"
    part, start = frozen[0], f"gathered in a micro step for the frozen {frozen[0].name}: "
    if part.engine == "resident":
        return start + "nothing, it is resident"
    size = part.count * value_size(plan.run) / GB
    node = option(plan.run.deepspeed, "zero_hpz_partition_size")
    everywhere = "from all GPUs" if plan.tensor_size == 1 else "from a data group"
    group = data_gpus(plan, gpus)
    group, where = (node, "inside the node") if node > 1 else (group, everywhere)
    others = size * (group - 1) / group
    return f"{start}{size:.1f} GB {where}, {others:.1f} GB of it from other GPUs"


def _buckets(deepspeed: Mapping[str, Any], size: int, trained: int) -> float:
    if not option(deepspeed, "contiguous_gradients"):
        return 0.0
    stage, bucket = zero_stage(deepspeed), option(deepspeed, "reduce_bucket_size")
    if stage == 3:
        return (bucket + min(bucket, trained)) * size
    sums_in_fp32 = get(deepspeed, "data_types.grad_accum_dtype") == "fp32"
    if stage == 1 and sums_in_fp32 and size < FP32:
        return 0.0
    return bucket * size * (2 if get(deepspeed, "zero_optimization.overlap_comm") else 1)


def option(deepspeed: Mapping[str, Any], name: str) -> Any:
    """A value of `zero_optimization`, or DeepSpeed's default."""
    given = get(deepspeed, f"zero_optimization.{name}")
    return DEFAULTS[name] if given is None else given


def _trained(plan: Plan) -> int:
    """Parameters that the generator's engine trains."""
    own = (p for p in plan.parts if p.engine == "generator")
    return sum(part.held for part in own if part.kind == "trained")


def _in_engine(plan: Plan) -> int:
    """Parameters that the generator's engine divides, trained or frozen."""
    own = (p for p in plan.parts if p.engine == "generator")
    return sum(part.held for part in own if part.kind != "buffers")


def _average_bytes(plan: Plan) -> float:
    return 0.0 if plan.run.config.ema is None else FP32 * _trained(plan)
