"""The only file of the training path that imports deepspeed: process group, engines, first weights.

The generator engine holds the tokenizer (and the teacher) under the ZeRO stage of the JSON; the
discriminator has a small engine of its own under ZeRO-1. Weights are filled in before
`deepspeed.initialize`, module by module, so that under ZeRO-3 no process holds the whole model.
They are NaN until then: what stays without a value is found and named.
"""

from __future__ import annotations

import contextlib
import logging
import os
from datetime import timedelta
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.nn.functional as F
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from vqrae_ds import watchdog
from vqrae_ds.attention import choose_attention
from vqrae_ds.config import Run
from vqrae_ds.config.deepspeed_json import for_discriminator, for_engine
from vqrae_ds.determinism import make_deterministic
from vqrae_ds.models.discriminator import build_discriminator as new_discriminator
from vqrae_ds.models.encoders import build_encoder
from vqrae_ds.models.training_model import TrainingModel
from vqrae_ds.models.vqrae import VQRAE
from vqrae_ds.ops.code_search import choose_search
from vqrae_ds.parallel.groups import Groups, Ranks, make_data_groups, make_groups
from vqrae_ds.parallel.model import sliced_parts
from vqrae_ds.parallel.slices import ALONE
from vqrae_ds.ranks import failing_together
from vqrae_ds.sharding import first_weights, resident
from vqrae_ds.sharding.first_discriminator import load_discriminator
from vqrae_ds.sharding.first_weights import Source, freed_memory_returned, uninitialized_is_nan
from vqrae_ds.sharding.parameter_groups import (
    discriminator_groups,
    parameter_groups,
    set_learning_rate,
)


def start(timeout: timedelta, deterministic: bool = False, tensor_size: int = 1) -> Ranks:
    """Join the process group: NCCL with GPUs, gloo without.

    A peer that is gone ends the run after `timeout`. `make_deterministic` says what
    `deterministic` promises.
    """
    if deterministic:
        make_deterministic()
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)  # it warns of what is meant to be
    on_gpu = _on_gpu()
    if not on_gpu:
        # The shared-memory op is compiled at first use, silently, and hangs on the lock of a
        # killed build. Plain gloo is as fast.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" not in os.environ:
        raise ValueError("start it with the launcher: deepspeed --module vqrae_ds.train ...")
    backend = "nccl" if on_gpu else "gloo"
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    device = torch.device(deepspeed.get_accelerator().current_device_name())
    return Ranks(dist.get_rank(), dist.get_world_size(), device, tensor_size)


def gathered(parameters: list[nn.Parameter]) -> contextlib.AbstractContextManager:
    """Inside, the parameters are whole on every rank, to read. All ranks enter it together."""
    return deepspeed.zero.GatheredParameters(parameters)


def stop() -> None:
    """Leave the process group, all ranks together."""
    dist.barrier()
    dist.destroy_process_group()


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a small tensor over all ranks."""
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


@freed_memory_returned()
def build_generator(run: Run, *, fill: bool = True) -> DeepSpeedEngine:
    """The generator's engine. With `fill=False` the weights are NaN until a checkpoint sets them.

    Raises `ValueError`, on all ranks together, for weight files that do not fit or are damaged.
    """
    config, groups = run.config, _groups(run)
    model = build_model(run, groups)
    sources: dict[str, Source] = {}
    if fill:
        with failing_together():
            place = ALONE if groups is None else groups.place
            sources = first_weights.find_sources(model, config, place)
        fill_weights(model, sources, groups)
    else:
        first_weights.poison(model, set(model.state_dict()))
    if config.memory.frozen_encoder == "resident":
        device = torch.device(deepspeed.get_accelerator().current_device_name())
        dtype = torch.bfloat16 if run.bf16 else torch.float32
        resident.take_out(model, gathered, device, dtype)
    parameters = parameter_groups(model, run.deepspeed["optimizer"]["params"], config.lr_multiplier)
    engine = _initialize(model, parameters, for_engine(run.deepspeed), groups)
    if fill:
        resident.check_filled(model)
    if _has_fp32_masters_of_bf16(run):
        with failing_together():
            _set_masters(engine, sources)
    _keep_codes(engine)
    set_learning_rate(engine, 0)  # else DeepSpeed takes the first step at 0 and is late by one
    return engine


def build_model(run: Run, groups: Groups | None = None) -> TrainingModel:
    """The generator's module, under ZeRO-3 in partitions, before its weights are set.

    `fill_weights` sets them. Of what tensor-parallel `groups` divide it has this rank's slices.
    """
    config, memory = run.config, run.config.memory
    attention = choose_attention(on_gpu=_on_gpu(), bf16=run.bf16)
    search = choose_search(on_gpu=_on_gpu())
    torch.manual_seed(config.run.seed)
    # A module is partitioned as soon as it is built, so no process ever holds two of them whole;
    # nothing is drawn, because all is set later.
    with no_init_weights(), uninitialized_is_nan(), _partitioned(run, groups):
        vqrae = VQRAE(
            config=config.model,
            freeze_encoder=config.stage == 1,
            attention=attention,
            encoder_checkpointing=memory.encoder_checkpointing,
            decoder_checkpointing=memory.decoder_checkpointing,
            **sliced_parts(config.model.num_embeddings, groups, search),
        )
        teacher, distillation = None, config.losses.distillation
        if distillation is not None:
            teacher = build_encoder(config.model, attention)
        in_training = distillation is not None and distillation.teacher.weight > 0
        model = TrainingModel(vqrae, teacher, teacher_in_training=in_training)
    for buffer in model.buffers():
        if buffer.is_floating_point():  # zero.Init built them in the parameters' dtype
            buffer.data = buffer.data.float()
    return model


def build_discriminator(run: Run, *, fill: bool = True) -> DeepSpeedEngine | None:
    """The discriminator's engine, or None where the recipe has no GAN.

    It shares batch, optimizer, clipping and precision of the JSON; its schedule starts with it.
    Tensor-parallel groups do not divide it: it is data-parallel over all ranks, and that each image
    counts once for every rank of a group changes no mean.
    """
    gan = run.config.losses.adversarial
    if gan is None or gan.weight == 0:
        return None
    deepspeed_config = for_discriminator(run.deepspeed)
    deepspeed_config["optimizer"]["params"]["lr"] *= run.config.lr_multiplier.discriminator
    if "scheduler" in deepspeed_config:
        steps = run.schedule.total_steps - gan.first_discriminator_step
        deepspeed_config["scheduler"]["params"]["total_num_steps"] = max(steps, 1)
    tensor_size = run.schedule.batch.tensor_size
    deepspeed_config["train_batch_size"] *= tensor_size
    torch.manual_seed(run.config.run.seed + 1)
    discriminator = new_discriminator(gan)
    if fill:
        with failing_together():
            load_discriminator(discriminator, run.config.init)
    groups = make_data_groups(_timeout(run)) if tensor_size > 1 else None
    parameters = discriminator_groups(discriminator)
    engine = _initialize(discriminator, parameters, deepspeed_config, groups)
    set_learning_rate(engine, 0)
    return engine


@torch.no_grad()
def fill_weights(
    model: TrainingModel, sources: dict[str, Source], groups: Groups | None = None
) -> None:
    """Give every tensor its first value: from `sources` by name, else drawn anew.

    Only rank 0 reads and draws, and with `groups` the first rank of each data group, all from the
    same random state; the others receive their share, below stage 3 from `deepspeed.initialize`.
    Buffers that have no source and are not drawn keep what they were built with on rank 0. Raises
    on all ranks together.
    """
    resets = dict(model.vqrae.resets())
    tensors = first_weights.stored_tensors(model)
    first_weights.poison(model, set(sources))
    failed: Exception | None = None  # raised when the peers are out of the loop too
    fills = dist.get_rank() == 0 if groups is None else groups.get_data_parallel_rank() == 0
    for module, own in tensors.items():
        watchdog.progress()
        parameters = list(module.parameters(recurse=False))
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            if fills and failed is None:
                try:
                    if module in resets and not own.keys() <= sources.keys():
                        resets[module]()
                    first_weights.copy(own, sources)
                except Exception as error:
                    failed = error
    for buffer in model.buffers():
        _broadcast(buffer)
    with failing_together():
        if failed is not None:
            raise failed


def _initialize(
    model: nn.Module, parameters: list[dict], config: dict, groups: Groups | None
) -> DeepSpeedEngine:
    engine, *_ = deepspeed.initialize(
        model=model, model_parameters=parameters, config=config, mpu=groups
    )
    if groups is not None:
        reduce = engine.buffered_allreduce_fallback

        def reduce_over_own_groups(*args: Any, **kwargs: Any) -> None:
            # It asks a global, which names the groups of the engine that was built last.
            deepspeed.utils.groups.mpu = groups
            reduce(*args, **kwargs)

        engine.buffered_allreduce_fallback = reduce_over_own_groups
    return engine


def _keep_codes(engine: DeepSpeedEngine) -> None:
    """Have the codes projected once a step: they are forgotten when the weights are to change.

    The base optimizer is the one place that every step passes through and a skipped one does not.
    The other change of weights is the loading of a checkpoint, which does so itself.
    """
    quantizer = engine.module.vqrae.quantizer
    quantizer.keep_codes()
    engine.basic_optimizer.register_step_pre_hook(lambda *_: quantizer.forget_codes())


def _set_masters(engine: DeepSpeedEngine, sources: dict[str, Source]) -> None:
    """DeepSpeed makes the fp32 masters of the bf16 parameters: give them back what was rounded.

    Each rank reads its own share of the file, which is mapped and not loaded.
    """
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and name in sources:
            source = sources[name]
            if not hasattr(parameter, "ds_tensor"):
                value = source.read()
                assert value.shape == parameter.shape, "DeepSpeed would not notice"
                safe_set_full_fp32_param(parameter, value.float().to(engine.device))
                continue
            size = parameter.ds_tensor.ds_numel
            share = source.read_range(parameter.ds_zero_partition_rank * size, size).float()
            padded = F.pad(share, (0, size - len(share)))  # the last ranks' shares are
            safe_set_local_fp32_param(parameter, padded.to(engine.device))


def _has_fp32_masters_of_bf16(run: Run) -> bool:
    return run.bf16 and not run.deepspeed["bf16"].get("bf16_master_weights_and_grads", False)


def _on_gpu() -> bool:
    """DeepSpeed decides: DS_ACCELERATOR=cpu keeps a GPU machine on its CPUs."""
    return deepspeed.get_accelerator().device_name() == "cuda"


def _partitioned(run: Run, groups: Groups | None) -> contextlib.AbstractContextManager:
    if run.deepspeed["zero_optimization"]["stage"] != 3:
        return contextlib.nullcontext()
    data_group = None if groups is None else groups.data_group
    return deepspeed.zero.Init(
        config_dict_or_path=for_engine(run.deepspeed), data_parallel_group=data_group, mpu=groups
    )


def _groups(run: Run) -> Groups | None:
    return make_groups(run.schedule.batch.tensor_size, _timeout(run))


def _timeout(run: Run) -> timedelta:
    return timedelta(minutes=run.config.run.collective_timeout_minutes)


def _broadcast(buffer: Tensor) -> None:
    device = deepspeed.get_accelerator().current_device_name()
    moved = buffer.data.to(device)
    dist.broadcast(moved, 0)
    buffer.data.copy_(moved)
