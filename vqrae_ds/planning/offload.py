"""What an optimizer in the host's memory costs in a step, with DeepSpeed 0.19.8.

Under ZeRO-3 (`partition_grads` of its runtime/zero/stage3.py) a rank's share of the gradients goes
to the host and back to the GPU in each micro step, and after the last one to the host once more, in
the dtype of the masters. Then each rank updates its share on the host's cores, rounds it and sends
it to its GPU. ZeRO-1 and 2 are planned likewise.

The update is bound by the host's memory. PyTorch's AdamW reads or writes a whole vector 20 times:
decay 2, first moment 3, second 5, its root, quotient and sum 6, weights 4. Clipping and rounding do
so twice each. The host's cores are not planned: too few of them, or too few OMP_NUM_THREADS, take
longer.
"""

from __future__ import annotations

from typing import NamedTuple

from vqrae_ds.config.deepspeed_json import batch_arithmetic
from vqrae_ds.planning.parts import Plan
from vqrae_ds.planning.states import FP32, data_gpus, is_offloaded, parameter_bytes, zero_stage
from vqrae_ds.planning.traffic import Bandwidth, node_size

ADAMW_PASSES, SGD_PASSES, AVERAGE_PASSES = 20, 11, 3
CLIPPING_AND_ROUNDING = 4


class Offload(NamedTuple):
    """Bytes of an optimizer step."""

    gradients: float  # between a GPU and its host, beside the micro steps
    weights: float  # likewise, after them
    update: float  # that the ranks of a node read from and write to its memory, after them


class OffloadSeconds(NamedTuple):
    """How long it takes: what can hide behind the micro steps, and what the step waits for."""

    beside: float = 0.0
    after: float = 0.0


def step_offload(plan: Plan, gpus: int) -> Offload | None:
    """What `offload_optimizer` moves in an optimizer step on `gpus` GPUs; None without it."""
    deepspeed = plan.run.deepspeed
    if not is_offloaded(deepspeed):
        return None
    size = parameter_bytes(deepspeed, zero_stage(deepspeed))
    steps = batch_arithmetic(deepspeed, gpus).accumulation
    trained = sum(p.held for p in plan.parts if p.engine == "generator" and p.kind == "trained")
    share = trained / data_gpus(plan, gpus)
    passes = ADAMW_PASSES if deepspeed["optimizer"]["type"] == "AdamW" else SGD_PASSES
    passes += CLIPPING_AND_ROUNDING + (AVERAGE_PASSES if plan.run.config.ema is not None else 0)
    return Offload(
        gradients=share * (2 * steps * size.gradient + size.master),
        weights=share * size.parameter,
        update=min(gpus, node_size(plan)) * share * passes * FP32,
    )


def offload_seconds(plan: Plan, gpus: int, bandwidth: Bandwidth) -> OffloadSeconds:
    """Seconds of an optimizer step that `step_offload` takes at these bandwidths."""
    moved = step_offload(plan, gpus)
    if moved is None:
        return OffloadSeconds()
    after = moved.weights / bandwidth.bus + moved.update / bandwidth.host_memory
    return OffloadSeconds(moved.gradients / bandwidth.bus, after)
