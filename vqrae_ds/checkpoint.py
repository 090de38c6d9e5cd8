"""Checkpoints of a run: save, find the newest intact one, resume; and another run's to start from.

    RUN/checkpoints/step_00001000/
      generator/            DeepSpeed's files of the generator engine; resident.safetensors, where
                            frozen weights are whole on every rank
      discriminator/        DeepSpeed's files of the discriminator engine, where there is one
      model_config.json     the tokenizer's configuration: a checkpoint can be converted by itself
      run.json              YAML and DeepSpeed JSON as resolved, which a resume is held to
      trainer_state.json    step, samples, stage, and what else the training loop remembers
      rng_rank_00000.pt     random states of each rank
      ema_rank_00000.pt     each rank's share of the moving average of the weights, where it is on
      manifest.json         written last: without it the folder does not exist for a resume

DeepSpeed's own marker `latest` is neither atomic nor last, so it is not written.
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from vqrae_ds import manifest
from vqrae_ds.config import Run, check_same_model
from vqrae_ds.config.files import read_json
from vqrae_ds.config.resuming import check_same_run, record
from vqrae_ds.conversion.rank_files import RESIDENT_FILE, average_file
from vqrae_ds.conversion.safetensors_stream import StreamedTensor, write_file
from vqrae_ds.models.vqrae import config_json
from vqrae_ds.ranks import failing_together, from_rank_0, gather
from vqrae_ds.sharding.ema import WeightAverage

logger = logging.getLogger(__name__)

GENERATOR, DISCRIMINATOR = "generator", "discriminator"
MODEL_CONFIG, RUN, TRAINER_STATE = "model_config.json", "run.json", "trainer_state.json"


class TrainState(NamedTuple):
    """How far the run is: optimizer steps taken, and samples consumed by all ranks."""

    step: int = 0
    samples: int = 0


class Resumed(NamedTuple):
    """What a checkpoint brings beside what `resume` has loaded already.

    `extra` is as it was given to `save`, every float to the last bit. `resident` are the frozen
    weights by their names in the engine's module, mapped and not loaded.
    """

    state: TrainState
    extra: dict[str, Any]
    resident: dict[str, Tensor]


def step_folder(run: Run, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return Path(run.config.run.output_dir) / "checkpoints" / f"step_{step:08d}"


def save(
    run: Run,
    generator: Any,
    discriminator: Any,
    state: TrainState,
    *,
    ema: WeightAverage | None = None,
    extra: dict[str, Any] | None = None,
    resident: dict[str, Tensor] | None = None,
) -> Path:
    """Write a checkpoint; every rank calls it. Returns its folder, complete on return.

    `extra` is anything that JSON can hold. `resident` are frozen weights that the generator's
    engine does not hold, by their names in its module; those of rank 0 are written.
    """
    folder = step_folder(run, state.step)
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)  # left by a save that was interrupted
        folder.mkdir(parents=True)
    dist.barrier()
    generator.save_checkpoint(str(folder), tag=GENERATOR, save_latest=False)
    if discriminator is not None:
        discriminator.save_checkpoint(str(folder), tag=DISCRIMINATOR, save_latest=False)
    torch.save(_random_state(), _random_file(folder))
    if ema is not None:
        torch.save(ema.state_dict(), average_file(folder, dist.get_rank()))
    if dist.get_rank() == 0:
        if resident:
            _write_resident(folder / GENERATOR / RESIDENT_FILE, resident)
        (folder / MODEL_CONFIG).write_text(config_json(run.config.model))
        (folder / RUN).write_text(json.dumps(record(run), indent=2) + "\n")
        trainer_state = {**state._asdict(), "stage": run.config.stage, "extra": extra or {}}
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
    the newest one belongs to the other stage or to another number of ranks, or was written with a
    configuration that a resume must not change.
    """
    checkpoints = Path(run.config.run.output_dir) / "checkpoints"
    for folder in from_rank_0(lambda: manifest.complete_steps(checkpoints)):
        if damage := _find_damage(folder):
            logger.warning("passing over %s: %s", folder, "; ".join(damage))
            continue
        with failing_together():
            _check_fits(folder, run)
        return folder
    return None


def resolve_start(run: Run) -> Run:
    """The run with `init.from_run` naming the newest intact step folder of what it named.

    The same on every rank; the ranks share the reading. Raises `ValueError` on every rank, before
    anything is built, where none is intact. Without `init.from_run` nothing changes.
    """
    start = run.config.init.from_run
    if start is None:
        return run
    folders: list[Path] = []
    with failing_together():
        if dist.get_rank() == 0:
            folders = manifest.find_step_folders(Path(start))
            manifest.read_manifest(folders[0])
    damage: list[str] = []
    for folder in from_rank_0(lambda: folders):
        damage = _find_damage(folder)
        if not damage:
            logger.info("weights to start from: %s", folder)
            init = run.config.init.model_copy(update={"from_run": str(folder)})
            return run._replace(config=run.config.model_copy(update={"init": init}))
        logger.warning("passing over %s: %s", folder, "; ".join(damage))
    raise ValueError(f"init.from_run: {start} holds no intact checkpoint: {'; '.join(damage)}")


def resume(
    folder: Path, generator: Any, discriminator: Any, ema: WeightAverage | None = None
) -> Resumed:
    """Load everything that `save` wrote into engines of the same configuration.

    All but `Resumed.resident`, which is left to the caller.
    """
    _load(generator, folder, GENERATOR)
    if discriminator is not None:
        _load(discriminator, folder, DISCRIMINATOR)
    if ema is not None:
        path = average_file(folder, dist.get_rank())
        if not path.is_file():
            raise ValueError(f"{folder} holds no {path.name}: ema was off when it was written")
        ema.load_state_dict(torch.load(path, map_location="cpu", mmap=True, weights_only=True))
    _set_random_state(torch.load(_random_file(folder), weights_only=True))
    saved = json.loads((folder / TRAINER_STATE).read_text())
    resident = folder / GENERATOR / RESIDENT_FILE
    logger.info("resumed from %s", folder)
    return Resumed(
        TrainState(saved["step"], saved["samples"]),
        saved.get("extra", {}),
        load_file(resident) if resident.is_file() else {},
    )


def _find_damage(folder: Path) -> list[str]:
    """A line for each file that is not what the manifest says; each rank reads its share."""
    found = from_rank_0(lambda: manifest.read_manifest(folder))
    mine = dict(list(found.files.items())[dist.get_rank() :: dist.get_world_size()])
    return sum(gather(manifest.find_damage(folder, found._replace(files=mine))), [])


def _check_fits(folder: Path, run: Run) -> None:
    found = manifest.read_manifest(folder)
    if found.stage != run.config.stage:
        raise ValueError(f"run.output_dir: {folder} belongs to stage {found.stage}: choose another")
    if found.world_size != dist.get_world_size():
        raise ValueError(
            f"{folder} was written by {found.world_size} ranks and this run has "
            f"{dist.get_world_size()}: start with the same number"
        )
    if (folder / RUN).is_file():
        check_same_run(run, read_json(folder / RUN, "run.output_dir"), folder / RUN)
    else:  # of an earlier version
        check_same_model(run.config.model, folder / MODEL_CONFIG, "run.output_dir")


def _write_resident(path: Path, tensors: dict[str, Tensor]) -> None:
    """Piece by piece, so that the host never holds a copy of the whole."""

    def pieces(tensor: Tensor) -> Iterator[Tensor]:
        for piece in tensor.detach().reshape(-1).split(1 << 20):
            yield piece.cpu()

    streamed = [
        StreamedTensor(name, tuple(t.shape), t.dtype, functools.partial(pieces, t))
        for name, t in tensors.items()
    ]
    write_file(path, streamed, lambda written: None)


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
