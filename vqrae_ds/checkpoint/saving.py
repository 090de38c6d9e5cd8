"""Write a checkpoint: DeepSpeed's files, the trainer's own, their checksums, the manifest."""

from __future__ import annotations

import json
import logging
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vqrae_ds import manifest
from vqrae_ds.checkpoint import frozen
from vqrae_ds.checkpoint.names import (
    DISCRIMINATOR,
    GENERATOR,
    MODEL_CONFIG,
    RUN,
    TRAINER_STATE,
    TrainState,
    random_file,
    step_folder,
)
from vqrae_ds.config import Run
from vqrae_ds.config.resuming import record
from vqrae_ds.conversion.rank_files import average_file
from vqrae_ds.models.vqrae import config_json
from vqrae_ds.ranks import from_rank_0, gather
from vqrae_ds.sharding.ema import WeightAverage

logger = logging.getLogger(__name__)


def save(
    run: Run,
    generator: Any,
    discriminator: Any,
    state: TrainState,
    *,
    ema: WeightAverage | None = None,
    extra: dict[str, Any] | None = None,
    pretrained: manifest.FileRecord | None = None,
) -> Path:
    """Write a checkpoint; every rank calls it. Returns its folder, complete on return.

    `extra` is anything that JSON can hold. `pretrained` is what `write_pretrained` gave: without
    it, or where the file is gone, the run's frozen pretrained weights are written now.
    """
    pretrained = frozen.write_pretrained(run, generator, pretrained)
    folder = step_folder(run, state.step)
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # left by a save that was interrupted
        folder.mkdir(parents=True)
    dist.barrier()
    generator.save_checkpoint(
        str(folder), tag=GENERATOR, save_latest=False, exclude_frozen_parameters=True
    )
    frozen.write_others(folder / GENERATOR, generator)
    if discriminator is not None:
        discriminator.save_checkpoint(str(folder), tag=DISCRIMINATOR, save_latest=False)
    torch.save(_random_state(), random_file(folder))
    if ema is not None:
        torch.save(ema.state_dict(), average_file(folder, dist.get_rank()))
    if dist.get_rank() == 0:
        (folder / MODEL_CONFIG).write_text(config_json(run.config.model))
        (folder / RUN).write_text(json.dumps(record(run), indent=2) + "\n")
        trainer_state = {**state._asdict(), "stage": run.config.stage, "extra": extra or {}}
        (folder / TRAINER_STATE).write_text(json.dumps(trainer_state))
    dist.barrier()
    files = _hash_together(folder)
    if dist.get_rank() == 0:
        packages = ("torch", "deepspeed", "transformers")
        versions = {package: version(package) for package in packages}
        written = manifest.Manifest(
            state.step, run.config.stage, dist.get_world_size(), versions, files, pretrained
        )
        manifest.write_manifest(folder, written)
        _remove_old(folder, run.config.checkpoint.keep_last)
    dist.barrier()
    logger.info("checkpoint %s", folder)
    return folder


def _remove_old(newest: Path, keep_last: int) -> None:
    """Keep `newest`, just written, and some before it; any beyond it had been found damaged."""
    complete = manifest.complete_steps(newest.parent)
    position = complete.index(newest)
    for folder in complete[:position] + complete[position + keep_last :]:
        # Without its manifest it does not exist any more, however far the rest gets.
        (folder / manifest.MANIFEST_NAME).unlink()
        shutil.rmtree(folder)


def _hash_together(folder: Path) -> dict[str, manifest.FileRecord]:
    """Each rank hashes its share of the files; a shared file system may list them differently."""
    names = from_rank_0(lambda: manifest.list_files(folder))
    mine = names[dist.get_rank() :: dist.get_world_size()]
    shares = gather({name: manifest.hash_file(folder / name) for name in mine})
    return {name: record for share in shares for name, record in share.items()}


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
