"""What is called how in a checkpoint folder, and how far a run is that wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
import xxhash

from vqrae_ds.config import Run

RUN, TRAINER_STATE = "run.json", "trainer_state.json"


class TrainState(NamedTuple):
    """How far the run is: optimizer steps taken, and samples consumed by all ranks."""

    step: int = 0
    samples: int = 0


def checkpoints_folder(run: Run) -> Path:
    """Where the run's checkpoints are."""
    return Path(run.config.run.output_dir) / "checkpoints"


def step_folder(run: Run, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return checkpoints_folder(run) / f"step_{step:08d}"


def local_root(run: Run) -> Path:
    """The folder on a node's own disk that belongs to this run alone.

    Runs that share `checkpoint.local_dir` and the last part of their paths are kept apart.
    """
    output = Path(run.config.run.output_dir).resolve()
    digest = xxhash.xxh3_64(str(output).encode()).hexdigest()
    return Path(run.config.checkpoint.local_dir) / f"{output.name}-{digest}"


def local_step_folder(run: Run, step: int) -> Path:
    """Where this rank, and no other, writes the checkpoint on its node's own disk."""
    return local_root(run) / f"rank_{dist.get_rank():05d}" / step_folder(run, step).name


def random_file(folder: Path) -> Path:
    """The file in a checkpoint's folder that holds the random states of this rank."""
    return folder / f"rng_rank_{dist.get_rank():05d}.pt"
