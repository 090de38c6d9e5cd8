"""Which checkpoints stay: the last ones, those of certain steps, and nothing half-written."""

from __future__ import annotations

import shutil
from pathlib import Path

from vqrae_ds import manifest
from vqrae_ds.config import CheckpointConfig


def remove(folder: Path) -> None:
    """Remove a checkpoint or what there is of one. Raises `OSError` where its manifest stays."""
    # Without its manifest it does not exist any more, however far the rest gets.
    (folder / manifest.MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def remove_partial(checkpoints: Path, up_to: int) -> None:
    """Remove what killed saves left of steps up to `up_to`: folders without a manifest."""
    for step, folder in manifest.step_folders(checkpoints).items():
        if step <= up_to and not (folder / manifest.MANIFEST_NAME).exists():
            shutil.rmtree(folder, ignore_errors=True)


def remove_old(newest: Path, config: CheckpointConfig) -> None:
    """Keep `newest`, just written, some before it, and those of steps kept for ever.

    Any beyond it had been found damaged, whatever its step.
    """
    complete = manifest.complete_steps(newest.parent)
    position = complete.index(newest)
    for folder in complete[:position]:
        remove(folder)
    for folder in complete[position + config.keep_last :]:
        step = manifest.read_manifest(folder).step
        if config.keep_every is None or step % config.keep_every:
            remove(folder)
