"""What the YAML, the DeepSpeed JSON and the number of ranks must agree on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vqrae_ds.config.deepspeed_json import get, list_divisors
from vqrae_ds.config.losses import LossConfig
from vqrae_ds.config.schema import TrainConfig


def check_together(config: TrainConfig, raw_json: Mapping[str, Any], world_size: int) -> None:
    """Raise `ValueError` for what DeepSpeed would do wrong without a word, or would not do.

    And where a tensor-parallel group cannot divide the model.
    """
    _check_selective(config, raw_json)
    _check_hpz(raw_json, world_size)
    _check_tensor_parallel(config, raw_json)


def check_starts(losses: LossConfig, steps: int, warmup: int) -> None:
    """Raise `ValueError` for a term that a run of `steps` would never reach.

    It is a mistake, most often of a run made shorter. So is a discriminator that would never end
    its warm-up, of `warmup` steps.
    """
    distillation = losses.distillation
    optional = {
        "perceptual": losses.perceptual,
        "convnext": losses.convnext,
        "adversarial": losses.adversarial,
    }
    terms = optional | {
        "reconstruction": losses.reconstruction,
        "quantizer": losses.quantizer,
        "distillation.quantized": distillation and distillation.quantized,
        "distillation.teacher": distillation and distillation.teacher,
    }
    for name, term in terms.items():
        if term is not None and term.weight > 0 and term.start_step >= steps:
            without = f"losses.{name}=null" if name in optional else f"losses.{name}.weight=0"
            raise ValueError(
                f"losses.{name}.start_step = {term.start_step} is not below the {steps} steps of "
                f"the run, and the term would never take part: set it lower, or {without}"
            )
    gan = losses.adversarial
    if gan is not None and gan.weight > 0 and warmup >= steps - gan.first_discriminator_step:
        raise ValueError(
            f"losses.adversarial: the discriminator trains for the last "
            f"{steps - gan.first_discriminator_step} steps and would never end its warm-up "
            f"(scheduler.params.warmup_num_steps = {warmup}): set its start lower, or "
            "losses.adversarial=null"
        )


def _check_tensor_parallel(config: TrainConfig, raw_json: Mapping[str, Any]) -> None:
    size = get(raw_json, "tensor_parallel.autotp_size")
    if size is None or size == 1:
        return
    start = f"tensor_parallel.autotp_size = {size}"
    heads, codes = config.model.decoder.num_heads, config.model.num_embeddings
    if heads % size:
        raise ValueError(
            f"{start} does not divide the {heads} heads of model.decoder.num_heads; these do: "
            f"{list_divisors(heads, size)}"
        )
    if codes < size:
        raise ValueError(
            f"{start} is above model.num_embeddings = {codes}: each rank holds a code at least"
        )
    if config.model.decoder.intermediate_size < size:
        raise ValueError(
            f"{start} is above model.decoder.intermediate_size = "
            f"{config.model.decoder.intermediate_size}"
        )
    if not config.model.use_simvq:
        raise ValueError(
            f"{start} needs model.use_simvq = true: the codes of moving averages are not divided"
        )
    if (get(raw_json, "zero_optimization.zero_hpz_partition_size") or 1) > 1:
        raise ValueError(
            f"{start} does not go with zero_optimization.zero_hpz_partition_size: remove one"
        )


def _check_selective(config: TrainConfig, raw_json: Mapping[str, Any]) -> None:
    """DeepSpeed's own `F.linear` adds the bias in place, to the very product that was kept."""
    kinds = {"decoder_checkpointing": config.memory.decoder_checkpointing}
    if config.stage == 2:  # before that the encoder is frozen and has no backward pass
        kinds["encoder_checkpointing"] = config.memory.encoder_checkpointing
    replaced = get(raw_json, "zero_optimization.memory_efficient_linear") is not False
    if get(raw_json, "zero_optimization.stage") != 3 or not replaced:
        return
    for name, kind in kinds.items():
        if kind == "selective":
            raise ValueError(
                f'memory.{name} = "selective" trains wrongly with ZeRO-3\'s own linear layer: set '
                "deepspeed.zero_optimization.memory_efficient_linear=false, or take full"
            )


def _check_hpz(raw_json: Mapping[str, Any], world_size: int) -> None:
    size = get(raw_json, "zero_optimization.zero_hpz_partition_size")
    if size is None or size == 1:
        return
    start = f"zero_optimization.zero_hpz_partition_size = {size}"
    stage = get(raw_json, "zero_optimization.stage")
    if stage != 3:
        raise ValueError(f"{start} has no effect with zero_optimization.stage = {stage}: remove it")
    if world_size % size:
        raise ValueError(
            f"{start} does not divide the {world_size} ranks: set it to the GPUs of one node"
        )
