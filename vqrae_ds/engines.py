"""The only file of the training path that imports deepspeed: process group, engines, first weights.

The generator engine holds the tokenizer (and the teacher) under the ZeRO stage of the JSON; the
discriminator has a small engine of its own under ZeRO-1. Weights are filled in before
`deepspeed.initialize`, module by module, so that no process ever holds the whole model.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import logging
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
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
    if not torch.cuda.is_available():
        # The shared-memory op is compiled at first use, silently, and hangs on the lock of a
        # killed build. Plain gloo is as fast.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if not dist.is_initialized():
        deepspeed.init_distributed(dist_backend=backend, timeout=timeout, verbose=False)
    device = torch.device(deepspeed.get_accelerator().current_device_name())
    return Ranks(dist.get_rank(), dist.get_world_size(), device)


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
    for buffer in floating_buffers(model):  # zero.Init built them in the parameters' dtype
        buffer.data = buffer.data.float()
    if fill:
        fill_weights(model, _sources(model, config))
    groups = _parameter_groups(model, run.deepspeed["optimizer"]["params"], config.lr_multiplier)
    fp32 = [buffer.clone() for buffer in floating_buffers(model)]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=run.deepspeed)
    for buffer, exact in zip(floating_buffers(model), fp32, strict=True):  # cast below ZeRO-3
        buffer.data = exact.to(buffer.device)
    return engine


def build_discriminator(run: Run) -> DeepSpeedEngine | None:
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
    if run.config.init.model is not None:
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


@contextlib.contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """The whole weights of `module` on every rank, to read."""
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        yield


def floating_buffers(module: nn.Module) -> list[Tensor]:
    """Feature statistics: they stay fp32 whatever the parameters are."""
    return [buffer for buffer in module.buffers() if buffer.is_floating_point()]


def _partitioned(deepspeed_config: dict[str, Any]) -> contextlib.AbstractContextManager:
    if deepspeed_config["zero_optimization"]["stage"] != 3:
        return contextlib.nullcontext()
    return deepspeed.zero.Init(config_dict_or_path=deepspeed_config)


def _attention(run: Run) -> str:
    bf16 = run.deepspeed.get("bf16", {}).get("enabled", False)
    if torch.cuda.is_available() and bf16 and importlib.util.find_spec("flash_attn") is not None:
        return "flash_attention_2"
    reason = (
        "flash-attn is not installed"
        if torch.cuda.is_available() and bf16
        else "needs CUDA and bf16"
    )
    logger.info("attention of the encoder: sdpa (flash attention: %s)", reason)
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
        group = {"params": parameters, "lr": optimizer_params["lr"] * getattr(multiplier, part)}
        if not decays:
            group["weight_decay"] = 0.0
        built.append(group)
    return built
