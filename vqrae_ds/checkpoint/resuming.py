"""Load a checkpoint into engines of the same configuration."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from vqrae_ds.checkpoint import frozen
from vqrae_ds.checkpoint.names import (
    DISCRIMINATOR,
    GENERATOR,
    TRAINER_STATE,
    TrainState,
    random_file,
)
from vqrae_ds.conversion.rank_files import average_file
from vqrae_ds.manifest import FileRecord, read_manifest
from vqrae_ds.sharding.ema import WeightAverage

logger = logging.getLogger(__name__)


class Resumed(NamedTuple):
    """What a checkpoint brings beside what `resume` has loaded already.

    `extra` is as it was given to `save`, every float to the last bit. `pretrained` is the record of
    the run's file of frozen pretrained weights, None where the checkpoint refers to none.
    """

    state: TrainState
    extra: dict[str, Any]
    pretrained: FileRecord | None


def resume(
    folder: Path, generator: Any, discriminator: Any, ema: WeightAverage | None = None
) -> Resumed:
    """Load everything that `save` wrote into engines of the same configuration.

    Raises `ValueError` where the checkpoint lacks a part that the engines have.
    """
    frozen.load(folder, generator)
    _load(generator, folder, GENERATOR)
    if discriminator is not None:
        _load(discriminator, folder, DISCRIMINATOR)
    if ema is not None:
        path = average_file(folder, dist.get_rank())
        if not path.is_file():
            raise ValueError(f"{folder} holds no {path.name}: ema was off when it was written")
        ema.load_state_dict(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    _set_random_state(torch.load(random_file(folder), weights_only=True))
    saved = json.loads((folder / TRAINER_STATE).read_text())
    logger.info("resumed from %s", folder)
    return Resumed(
        TrainState(saved["step"], saved["samples"]),
        saved.get("extra", {}),
        read_manifest(folder).frozen,
    )


def _load(engine: Any, folder: Path, tag: str) -> None:
    if not (folder / tag).is_dir():
        raise ValueError(f"{folder} holds no {tag}: losses.adversarial was off when it was written")
    # Not strict: the frozen parameters are in files of ours.
    path, _ = engine.load_checkpoint(str(folder), tag=tag, load_module_strict=tag != GENERATOR)
    assert path is not None, "DeepSpeed's way of saying that there is nothing to load"


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
