"""Checkpoints of a run: save, find the newest complete one, resume.

    RUN/checkpoints/step_00001000/
      generator/            DeepSpeed's files of the generator engine
      discriminator/        the same of the discriminator engine, where there is one
      model_config.json     the tokenizer's configuration: a checkpoint can be converted by itself
      trainer_state.json    step, samples, stage
      rng_rank_00000.pt     random states of each rank
      manifest.json         written last: without it the folder does not exist for a resume

DeepSpeed's own marker `latest` is neither atomic nor last, so it is not written.
"""

from __future__ import annotations

import json
import logging
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from vqrae_ds import manifest
from vqrae_ds.config import Run, check_same_model
from vqrae_ds.models.vqrae import config_json
from vqrae_ds.ranks import from_rank_0, gather

logger = logging.getLogger(__name__)

GENERATOR, DISCRIMINATOR = "generator", "discriminator"
MODEL_CONFIG, TRAINER_STATE = "model_config.json", "trainer_state.json"


class TrainState(NamedTuple):
    """How far the run is: optimizer steps taken, and samples consumed by all ranks."""

    step: int = 0
    samples: int = 0


def step_folder(run: Run, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return Path(run.config.run.output_dir) / "checkpoints" / f"step_{step:08d}"


def save(run: Run, generator: Any, discriminator: Any, state: TrainState) -> Path:
    """Write a checkpoint; every rank calls it. Returns its folder, complete on return."""
    folder = step_folder(run, state.step)
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # left by a save that was interrupted
        folder.mkdir(parents=True)
    dist.barrier()
    generator.save_checkpoint(str(folder), tag=GENERATOR, save_latest=False)
    if discriminator is not None:
        discriminator.save_checkpoint(str(folder), tag=DISCRIMINATOR, save_latest=False)
    torch.save(_random_state(), _random_file(folder))
    if dist.get_rank() == 0:
        (folder / MODEL_CONFIG).write_text(config_json(run.config.model))
        trainer_state = {**state._asdict(), "stage": run.config.stage}
        (folder / TRAINER_STATE).write_text(json.dumps(trainer_state))
    dist.barrier()
    files = _hash_together(folder)
    if dist.get_rank() == 0:
        packages = ("torch", "deepspeed", "transformers")
        versions = {package: version(package) for package in packages}
        manifest.write_manifest(
            folder,
            manifest.Manifest(state.step, run.config.stage, dist.get_world_size(), versions, files),
        )
        _remove_old(folder, run.config.checkpoint.keep_last)
    dist.barrier()
    logger.info("checkpoint %s", folder)
    return folder


def find(run: Run) -> Path | None:
    """The newest intact checkpoint of the run, the same on every rank; None for a fresh start.

    The ranks share the reading. Raises `ValueError` on every rank, before anything is built, where
    the newest one belongs to the other stage or to another number of ranks.
    """
    checkpoints = Path(run.config.run.output_dir) / "checkpoints"
    for folder in from_rank_0(lambda: manifest.complete_steps(checkpoints)):
        found = from_rank_0(lambda folder=folder: manifest.read_manifest(folder))
        mine = dict(list(found.files.items())[dist.get_rank() :: dist.get_world_size()])
        damage = gather(manifest.find_damage(folder, found._replace(files=mine)))
        if not any(damage):
            _check_fits(folder, found, run)
            return folder
        logger.warning("passing over %s: %s", folder, "; ".join(sum(damage, [])))
    return None


def resume(folder: Path, generator: Any, discriminator: Any) -> TrainState:
    """Load everything that `save` wrote into engines of the same configuration."""
    _load(generator, folder, GENERATOR)
    if discriminator is not None:
        _load(discriminator, folder, DISCRIMINATOR)
    _set_random_state(torch.load(_random_file(folder), weights_only=True))
    saved = json.loads((folder / TRAINER_STATE).read_text())
    logger.info("resumed from %s", folder)
    return TrainState(saved["step"], saved["samples"])


def _check_fits(folder: Path, found: manifest.Manifest, run: Run) -> None:
    if found.stage != run.config.stage:
        raise ValueError(f"run.output_dir: {folder} belongs to stage {found.stage}: choose another")
    if found.world_size != dist.get_world_size():
        raise ValueError(
            f"{folder} was written by {found.world_size} ranks and this run has "
            f"{dist.get_world_size()}: start with the same number"
        )
    check_same_model(run.config.model, folder / "model_config.json", "run.output_dir")


def _load(engine: Any, folder: Path, tag: str) -> None:
    if not (folder / tag).is_dir():
        raise ValueError(f"{folder} holds no {tag}: losses.adversarial was off when it was written")
    path, _ = engine.load_checkpoint(str(folder), tag=tag)
    assert path is not None, "DeepSpeed's way of saying that there is nothing to load"


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


def _random_file(folder: Path) -> Path:
    return folder / f"rng_rank_{dist.get_rank():05d}.pt"


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _set_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
