"""What the YAML, the DeepSpeed JSON and the number of ranks must agree on in the use of memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vqrae_ds.config.deepspeed_json import get
from vqrae_ds.config.schema import TrainConfig


def check_memory(config: TrainConfig, raw_json: Mapping[str, Any], world_size: int) -> None:
    """Raise `ValueError` for what DeepSpeed would do wrong without a word, or would not do."""
    _check_selective(config, raw_json)
    _check_hpz(raw_json, world_size)


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
