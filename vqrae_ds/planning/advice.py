"""The setting of a run that a model of its time finds fastest among those that fit.

The choice is between a frozen encoder that is resident or sharded, the size of the micro batch,
and activation checkpointing. Time is the longer one of computing and communicating. Computing is
all FLOPs at the given share of the peak, those included that checkpointing or the ranks of a
tensor-parallel group repeat, and on top what it takes to read the weights from the GPU's memory:
once a pass, so it weighs on small micro batches. An optimizer in the host's memory adds its update.
The model ranks settings; a time is measured, not planned.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

from vqrae_ds.config import Run
from vqrae_ds.config.deepspeed_json import batch_arithmetic
from vqrae_ds.monitoring.flops import flops_per_image, recomputed_flops, repeated_flops
from vqrae_ds.planning.activations import value_size
from vqrae_ds.planning.fitting import fits
from vqrae_ds.planning.offload import offload_seconds
from vqrae_ds.planning.parts import Plan, plan
from vqrae_ds.planning.peak import peak_bytes
from vqrae_ds.planning.states import zero_stage
from vqrae_ds.planning.traffic import step_traffic, traffic_seconds
from vqrae_ds.planning.work import Speed

GPU_MEMORY_BANDWIDTH = 3.35e12  # bytes a second: HBM3 of an H100 SXM, by its data sheet
LARGEST_MICRO_BATCH = 256
LINEAR = "deepspeed.zero_optimization.memory_efficient_linear"


class Setting(NamedTuple):
    """A choice, and what it leads to on each GPU."""

    overrides: tuple[str, ...]  # as the command line takes them
    peak: float  # bytes
    seconds: float  # of a step, by the model above


def recommend(given: Plan, gpus: int, gpu_memory: float, speed: Speed) -> Setting | None:
    """The fastest setting that fits into `gpu_memory` GB, or None where none fits.

    Times within 1 % of each other are the same: then the one with the least memory is taken.
    """
    settings = []
    for encoder, checkpointing in itertools.product(_encoders(given), _checkpointing(given.run)):
        memory = {"frozen_encoder": encoder, **checkpointing}
        base = plan(_with(given.run, memory, given.run.schedule.batch.micro_batch, gpus))
        for micro_batch in _micro_batches(given, gpus):
            run = _with(given.run, memory, micro_batch, gpus)
            planned = base._replace(run=run)
            if fits(planned, gpus, gpu_memory):
                peak = peak_bytes(planned, gpus).total
                seconds = step_seconds(planned, gpus, speed)
                settings.append(Setting(_overrides(run, memory), peak, seconds))
    if not settings:
        return None
    fastest = min(setting.seconds for setting in settings)
    return min((s for s in settings if s.seconds <= 1.01 * fastest), key=lambda s: s.peak)


def step_seconds(planned: Plan, gpus: int, speed: Speed) -> float:
    """Seconds of an optimizer step, by the model that this file begins with."""
    run, batch = planned.run, planned.run.schedule.batch
    an_image = flops_per_image(run) + repeated_flops(run) + recomputed_flops(run)
    computing = an_image * batch.global_batch / (gpus * speed.peak_tflops * 1e12 * speed.mfu)
    policies = run.config.memory
    again = {"encoder": policies.encoder_checkpointing, "decoder": policies.decoder_checkpointing}
    read = 0
    for part in planned.parts:
        if part.engine in ("generator", "resident") and part.kind != "buffers":
            passes = 1 if part.kind == "frozen" else 3
            is_again = part.kind == "trained" and again.get(part.name, "none") == "full"
            read += (passes + is_again) * part.held
    reading = batch.accumulation * read * value_size(run) / GPU_MEMORY_BANDWIDTH
    moving = traffic_seconds(step_traffic(planned, gpus), speed.bandwidth)
    offload = offload_seconds(planned, gpus, speed.bandwidth)
    return max(computing + reading, moving, offload.beside) + offload.after


def _encoders(given: Plan) -> list[str]:
    """Where there is something frozen, and it matters where it lies."""
    is_frozen = any(p.kind == "frozen" and p.name in ("encoder", "teacher") for p in given.parts)
    return ["sharded", "resident"] if is_frozen else ["sharded"]


def _checkpointing(run: Run) -> list[dict[str, str]]:
    """The same for both parts, where both train."""
    names = ["decoder_checkpointing"] + (["encoder_checkpointing"] if run.config.stage == 2 else [])
    return [dict.fromkeys(names, kind) for kind in ("none", "selective", "full")]


def _micro_batches(given: Plan, gpus: int) -> list[int]:
    """Those that divide what a rank has of the batch."""
    images, rest = divmod(given.run.schedule.batch.global_batch, gpus // given.tensor_size)
    most = min(images, LARGEST_MICRO_BATCH)
    return [] if rest else [n for n in range(1, most + 1) if images % n == 0]


def _with(run: Run, memory: dict[str, str], micro_batch: int, gpus: int) -> Run:
    """The run as the overrides would make it."""
    deepspeed = {**run.deepspeed, "train_micro_batch_size_per_gpu": micro_batch}
    zero = dict(deepspeed["zero_optimization"])
    if zero["stage"] == 3:
        zero["memory_efficient_linear"] = not _needs_plain_linear(run, memory)
    deepspeed["zero_optimization"] = zero
    config = run.config
    config = config.model_copy(update={"memory": config.memory.model_copy(update=memory)})
    batch = batch_arithmetic(deepspeed, gpus)
    return Run(config, deepspeed, run.schedule._replace(batch=batch))


def _needs_plain_linear(run: Run, memory: dict[str, str]) -> bool:
    return zero_stage(run.deepspeed) == 3 and "selective" in memory.values()


def _overrides(run: Run, memory: dict[str, str]) -> tuple[str, ...]:
    words = [f"memory.{name}={value}" for name, value in memory.items()]
    words.append(f"deepspeed.train_micro_batch_size_per_gpu={run.schedule.batch.micro_batch}")
    if zero_stage(run.deepspeed) == 3:
        plain = "false" if _needs_plain_linear(run, memory) else "true"
        words.append(f"{LINEAR}={plain}")
    return tuple(words)
