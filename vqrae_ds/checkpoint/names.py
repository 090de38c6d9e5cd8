"""What is called how in a checkpoint folder, and how far a run is that wrote it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from vqrae_ds.config import Run

GENERATOR, DISCRIMINATOR = "generator", "discriminator"
MODEL_CONFIG, RUN, TRAINER_STATE = "model_config.json", "run.json", "trainer_state.json"


class TrainState(NamedTuple):
    """How far the run is: optimizer steps taken, and samples consumed by all ranks."""

    step: int = 0
    samples: int = 0


def step_folder(run: Run, step: int) -> Path:
    """The folder of the checkpoint after `step` steps."""
    return Path(run.config.run.output_dir) / "checkpoints" / f"step_{step:08d}"


def random_file(folder: Path) -> Path:
    """The file in a checkpoint's folder that holds the random states of this rank."""
    return folder / f"rng_rank_{dist.get_rank():05d}.pt"
