"""The bytes that DeepSpeed 0.19.8 keeps on a GPU between two micro batches.

ZeRO-3 divides everything over the GPUs, ZeRO-2 all but the parameters, ZeRO-1 all but parameters
and gradients. It keeps masters beside parameters of the same dtype too. hpZ keeps a second
partition of the parameters. With tensor parallelism a rank has its slices, and ZeRO divides these
over the ranks that see different images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from vqrae_ds.config.deepspeed_json import for_discriminator, get
from vqrae_ds.planning.parts import Part, Plan

GB = 10**9
FP32, BF16 = 4, 2


class ParameterBytes(NamedTuple):
    """Bytes that a trained parameter takes; a frozen one takes `parameter` alone."""

    parameter: int
    gradient: int
    master: int
    optimizer: int


class StateBytes(NamedTuple):
    """Bytes of a part on one GPU, by kind; `optimizer` holds masters and moments."""

    parameters: float
    gradients: float = 0.0
    optimizer: float = 0.0


def state_bytes(plan: Plan, gpus: int, tensor_size: int | None = None) -> list[float]:
    """Bytes of model states on each of `gpus` GPUs, a number for each part of the plan.

    With `tensor_size` ZeRO divides as it would if tensor-parallel groups had this size.
    """
    size = plan.tensor_size if tensor_size is None else tensor_size
    return [sum(_bytes(part, plan.run.deepspeed, gpus, size)) for part in plan.parts]


def state_bytes_by_kind(plan: Plan, gpus: int) -> StateBytes:
    """Bytes of model states on each of `gpus` GPUs, over all parts of the plan."""
    parts = (_bytes(part, plan.run.deepspeed, gpus, plan.tensor_size) for part in plan.parts)
    return StateBytes(*(sum(kind) for kind in zip(*parts, strict=True)))


def data_gpus(plan: Plan, gpus: int) -> int:
    """How many GPUs see different images: ZeRO divides the generator over these."""
    return gpus // plan.tensor_size


def zero_stage(deepspeed: Mapping[str, Any]) -> int:
    """The ZeRO stage of the generator's engine."""
    return deepspeed["zero_optimization"]["stage"]


def is_offloaded(deepspeed: Mapping[str, Any]) -> bool:
    """Whether the optimizer is in the host's memory."""
    return get(deepspeed, "zero_optimization.offload_optimizer") is not None


def parameter_bytes(deepspeed: Mapping[str, Any], stage: int) -> ParameterBytes:
    """Bytes of a trained parameter, wherever each of them lies."""
    bf16 = get(deepspeed, "bf16.enabled") or False
    parameter = BF16 if bf16 else FP32
    state = BF16 if get(deepspeed, "bf16.bf16_master_weights_and_grads") else FP32
    dtype = get(deepspeed, "data_types.grad_accum_dtype")
    gradient = {None: parameter, "bf16": BF16, "fp32": FP32}[dtype]
    if stage == 1 and gradient > parameter:
        gradient += parameter  # DeepSpeed's optimizer for this pair keeps both
    params = deepspeed["optimizer"]["params"]
    moments = 2 if deepspeed["optimizer"]["type"] == "AdamW" else params.get("momentum", 0) > 0
    return ParameterBytes(parameter, gradient, state, moments * state)


def _on_gpu(deepspeed: Mapping[str, Any], stage: int) -> ParameterBytes:
    size = parameter_bytes(deepspeed, stage)
    return ParameterBytes(size.parameter, 0, 0, 0) if is_offloaded(deepspeed) else size


def _bytes(part: Part, deepspeed: Mapping[str, Any], gpus: int, tensor_size: int) -> StateBytes:
    if part.engine == "none":
        return StateBytes(part.count * FP32)
    if part.engine == "discriminator":  # as `engines.build_discriminator` configures it
        deepspeed = for_discriminator(deepspeed)
    else:  # the discriminator is divided over all ranks
        gpus //= tensor_size
    stage = zero_stage(deepspeed)
    size = _on_gpu(deepspeed, stage)
    parameters = part.held * size.parameter
    if stage == 3 and part.engine != "resident":
        node = get(deepspeed, "zero_optimization.zero_hpz_partition_size") or 1
        parameters = parameters / gpus + (parameters / node if node > 1 else 0)
    if part.kind != "trained":
        return StateBytes(parameters)
    gradients = part.held * size.gradient / (gpus if stage >= 2 else 1)
    return StateBytes(parameters, gradients, part.held * (size.master + size.optimizer) / gpus)
