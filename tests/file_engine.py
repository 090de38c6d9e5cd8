"""Checkpoints of one number, in one process: an engine that saves without DeepSpeed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from tests.tiny import make_run, save_initial
from vqrae_ds import checkpoint
from vqrae_ds.checkpoint import TrainState
from vqrae_ds.config import Run


class FileEngine:
    """Saves one number in the way of a DeepSpeed engine; nothing of it is frozen."""

    mpu = None  # no tensor-parallel group
    checkpoint_engine = None  # it has no writer of its own that ours could take the place of

    def __init__(self, value: int = 0, module: nn.Module | None = None) -> None:
        self.value = value
        self.module = module or nn.ModuleDict({"vqrae": nn.Identity()})

    def save_checkpoint(
        self, folder: str, tag: str, save_latest: bool, exclude_frozen_parameters: bool = False
    ) -> None:
        assert not save_latest
        self.checkpoint_engine.makedirs(str(Path(folder) / tag))
        self.checkpoint_engine.save(self.value, str(Path(folder) / tag / "state"))
        self._copy_recovery_script(folder)

    def _copy_recovery_script(self, folder: str) -> None:
        (Path(folder) / "zero_to_fp32.py").write_text("a script")


@contextlib.contextmanager
def run_alone(folder: Path) -> Iterator[Run]:
    """A run of one rank that keeps its last two checkpoints; inside it has a process group."""
    save_initial(folder / "initial")
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=0, world_size=1)
    try:
        yield make_run(folder, 1, checkpoint={"keep_last": 2}, world_size=1)
    finally:
        dist.destroy_process_group()


def save_at(run: Run, step: int) -> Path:
    return checkpoint.save(
        run, checkpoint.Content(FileEngine(step), FileEngine(-step), TrainState(step, 4 * step))
    )


def with_changes(run: Run, section: str, **changes: Any) -> Run:
    changed = getattr(run.config, section).model_copy(update=changes)
    return run._replace(config=run.config.model_copy(update={section: changed}))


def starting_from(run: Run, folder: Path) -> Run:
    init = {"from_run": str(folder), "model": None}
    return with_changes(with_changes(run, "run", output_dir="elsewhere"), "init", **init)
