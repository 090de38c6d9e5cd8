"""The only file of the training path that imports deepspeed: process group, engines, first weights.

The generator engine holds the tokenizer (and the teacher) under the ZeRO stage of the JSON; the
discriminator has a small engine of its own under ZeRO-1. Weights are filled in before
`deepspeed.initialize`, module by module, so that under ZeRO-3 no process holds the whole model.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import os
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.utils import safe_set_full_fp32_param
from safetensors.torch import load_file
from torch import Tensor, nn

from vqrae_ds.config import LearningRateMultiplierConfig, Run, TrainConfig
from vqrae_ds.models.discriminator import PatchDiscriminator
from vqrae_ds.models.encoders import ENCODERS
from vqrae_ds.models.training_model import TrainingModel
from vqrae_ds.models.vqrae import VQRAE
from vqrae_ds.models.weights import WeightFolder, check_names

logger = logging.getLogger(__name__)

PARTS = {  # part of `lr_multiplier` -> prefixes of parameter names
    "encoder": ("vqrae.encoder.",),
    "quantizer": ("vqrae.in_proj.", "vqrae.simvq.", "vqrae.out_proj."),
    "decoder": ("vqrae.decoder.",),
}


class Ranks(NamedTuple):
    """This process among its peers."""

    rank: int
    world_size: int
    device: torch.device


class Source(NamedTuple):
    """Where the first value of a tensor comes from."""

    folder: WeightFolder
    name: str


def start(timeout: timedelta) -> Ranks:
    """Join the process group: NCCL with GPUs, gloo without.

    A peer that is gone ends the run after `timeout`.
    """
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
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


def learning_rates(
    generator: DeepSpeedEngine, discriminator: DeepSpeedEngine | None
) -> dict[str, float]:
    """The learning rate of each part, as the next step will use it."""
    rates = {group["part"]: group["lr"] for group in generator.optimizer.param_groups}
    if discriminator is not None:
        rates["discriminator"] = discriminator.optimizer.param_groups[0]["lr"]
    return rates


def stop() -> None:
    """Leave the process group, all ranks together."""
    dist.barrier()
    dist.destroy_process_group()


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of a small tensor over all ranks."""
    dist.all_reduce(tensor)
    return tensor / dist.get_world_size()


def build_generator(run: Run, *, fill: bool = True) -> DeepSpeedEngine:
    """The generator's engine. With `fill=False` the weights are left for a checkpoint to set."""
    config = run.config
    attention = _attention(run)
    torch.manual_seed(config.run.seed)
    with _partitioned(run.deepspeed):
        vqrae = VQRAE(config=config.model, freeze_encoder=config.stage == 1, attention=attention)
        teacher = None
        if config.losses.distillation is not None and config.losses.distillation.teacher.weight > 0:
            teacher = ENCODERS[config.model.encoder_cls](config.model.encoder_config, attention)
        model = TrainingModel(vqrae, teacher)
    for buffer in model.buffers():
        if buffer.is_floating_point():  # zero.Init built them in the parameters' dtype
            buffer.data = buffer.data.float()
    sources = _sources(model, config) if fill else {}
    if fill:
        fill_weights(model, sources)
    groups = _parameter_groups(model, run.deepspeed["optimizer"]["params"], config.lr_multiplier)
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=run.deepspeed)
    if _is_bf16(run):
        _set_masters(engine, sources)
    return engine


def build_discriminator(run: Run, *, fill: bool = True) -> DeepSpeedEngine | None:
    """The discriminator's engine, or None where the recipe has no GAN.

    It shares batch, optimizer, clipping and precision of the JSON; its schedule starts with it.
    """
    gan = run.config.losses.adversarial
    if gan is None or gan.weight == 0:
        return None
    deepspeed_config = copy.deepcopy(run.deepspeed)
    deepspeed_config["zero_optimization"] = {"stage": 1}
    deepspeed_config["optimizer"]["params"]["lr"] *= run.config.lr_multiplier.discriminator
    if "scheduler" in deepspeed_config:
        steps = run.schedule.total_steps - gan.first_discriminator_step
        deepspeed_config["scheduler"]["params"]["total_num_steps"] = max(steps, 1)
    torch.manual_seed(run.config.run.seed + 1)
    discriminator = PatchDiscriminator(gan.channels, gan.num_layers)
    if fill and run.config.init.model is not None:
        _load_discriminator(discriminator, run.config.init.model)
    engine, *_ = deepspeed.initialize(
        model=discriminator,
        model_parameters=list(discriminator.parameters()),
        config=deepspeed_config,
    )
    return engine


@torch.no_grad()
def fill_weights(model: TrainingModel, sources: dict[str, Source]) -> None:
    """Give every tensor its first value: from `sources` by name, else drawn anew.

    Only rank 0 reads and draws; the others receive their share.
    """
    resets = {id(module): reset for module, reset in model.vqrae.resets()}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        own = dict(module.named_parameters(recurse=False))
        with deepspeed.zero.GatheredParameters(list(own.values()), modifier_rank=0):
            if dist.get_rank() == 0:
                if any(prefix + name not in sources for name in own):
                    resets[id(module)]()
                _copy(own, prefix, sources)
        buffers = {n: b for n, b in module.named_buffers(recurse=False) if prefix + n in sources}
        if dist.get_rank() == 0:
            _copy(buffers, prefix, sources)
        for buffer in buffers.values():
            _broadcast(buffer)


def _set_masters(engine: DeepSpeedEngine, sources: dict[str, Source]) -> None:
    """DeepSpeed makes the fp32 masters of the bf16 parameters: give them back what was rounded."""
    for name, parameter in engine.module.named_parameters():
        if parameter.requires_grad and name in sources:
            value = sources[name].folder.read(sources[name].name)
            safe_set_full_fp32_param(parameter, value.float().to(engine.device))


def _is_bf16(run: Run) -> bool:
    return run.deepspeed.get("bf16", {}).get("enabled", False)


def _on_gpu() -> bool:
    """DeepSpeed decides: DS_ACCELERATOR=cpu keeps a GPU machine on its CPUs."""
    return deepspeed.get_accelerator().device_name() == "cuda"


def _partitioned(deepspeed_config: dict[str, Any]) -> contextlib.AbstractContextManager:
    if deepspeed_config["zero_optimization"]["stage"] != 3:
        return contextlib.nullcontext()
    return deepspeed.zero.Init(config_dict_or_path=deepspeed_config)


def _attention(run: Run) -> str:
    if not (_on_gpu() and _is_bf16(run)):
        reason = "flash attention needs CUDA and bf16"
    elif importlib.util.find_spec("flash_attn") is None:
        reason = "flash-attn is not installed"
    else:
        logger.info("attention of the encoder: flash_attention_2")
        return "flash_attention_2"
    logger.info("attention of the encoder: sdpa (%s)", reason)
    return "sdpa"


def _sources(model: TrainingModel, config: TrainConfig) -> dict[str, Source]:
    """Precedence: 1. consolidated folder, 2. pretrained encoder, 3. nothing (drawn anew)."""
    expected = set(model.state_dict())
    if config.init.model is not None:
        folder = WeightFolder(config.init.model)
        sources = {f"vqrae.{name}": Source(folder, name) for name in folder.names()}
        if model.teacher is not None:
            encoder = [n for n in folder.names() if n.startswith("encoder.")]
            sources |= {f"teacher.{n.removeprefix('encoder.')}": Source(folder, n) for n in encoder}
    elif config.init.encoder_weights is not None:
        folder = WeightFolder(config.init.encoder_weights)
        sources = {f"vqrae.encoder.model.{name}": Source(folder, name) for name in folder.names()}
        expected = {name for name in expected if name.startswith("vqrae.encoder.model.")}
    else:
        logger.warning("no encoder weights: the encoder is UNTRAINED, its features mean nothing")
        return {}
    check_names(expected, set(sources), folder.folder)
    _check_shapes(model, sources)
    return sources


def _check_shapes(model: nn.Module, sources: dict[str, Source]) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name in sources:
            shape = tuple(getattr(tensor, "ds_shape", tensor.shape))
            found = sources[name].folder.shape(sources[name].name)
            if found != shape:
                where = f"{sources[name].name} in {sources[name].folder.folder}"
                raise ValueError(f"{where} has shape {found}, the model {shape}")


def _copy(targets: dict[str, Tensor], prefix: str, sources: dict[str, Source]) -> None:
    for name, target in targets.items():
        if source := sources.get(prefix + name):
            target.data.copy_(source.folder.read(source.name))


def _broadcast(buffer: Tensor) -> None:
    device = deepspeed.get_accelerator().current_device_name()
    moved = buffer.data.to(device)
    dist.broadcast(moved, 0)
    buffer.data.copy_(moved)


def _load_discriminator(discriminator: nn.Module, folder: str) -> None:
    """A discriminator that stage 1 trained goes on in stage 2; without one it starts anew."""
    path = Path(folder) / "discriminator.safetensors"
    if not path.is_file():
        logger.info("%s does not exist: the discriminator starts untrained", path)
        return
    try:
        discriminator.load_state_dict(load_file(path))
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit losses.adversarial (channels, num_layers): {error}"
        ) from error


def _parameter_groups(
    model: TrainingModel, optimizer_params: dict[str, Any], multiplier: LearningRateMultiplierConfig
) -> list[dict[str, Any]]:
    """One group a part and kind: no decay on norms, biases, scales and position embeddings."""
    groups: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            part = next(p for p, prefixes in PARTS.items() if name.startswith(prefixes))
            shape = getattr(parameter, "ds_shape", parameter.shape)
            decays = len(shape) >= 2 and "position" not in name and "cls_token" not in name
            groups.setdefault((part, decays), []).append(parameter)
    built = []
    for (part, decays), parameters in groups.items():
        rate = optimizer_params["lr"] * getattr(multiplier, part)
        group = {"params": parameters, "lr": rate, "part": part}
        if not decays:
            group["weight_decay"] = 0.0
        built.append(group)
    return built
