"""The saves of a run that goes on although one of them fails."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from pathlib import Path

import torch.distributed as dist

from vqrae_ds.checkpoint.names import checkpoints_folder, local_root
from vqrae_ds.checkpoint.publishing import Publication, save_locally
from vqrae_ds.checkpoint.retention import remove_partial
from vqrae_ds.checkpoint.saving import Content, SaveFailed, save
from vqrae_ds.checkpoint.space import find_shortage, own_bytes
from vqrae_ds.config import Run
from vqrae_ds.ranks import failing_together

logger = logging.getLogger(__name__)

LAST_ATTEMPTS, PAUSE_SECONDS = 3, 10.0  # time in which somebody may make room


class Saver:
    """Saves, directly or in two steps, and counts the saves that failed.

    Every rank has one, and calls its methods together with the others. `failed_saves` are those
    since this start of the run, `failure` the reason of the last one, None where the last save
    succeeded, and `newest` the last checkpoint that became complete.
    """

    def __init__(self, run: Run) -> None:
        self.failed_saves = 0
        self.failure: str | None = None
        self.newest: Path | None = None
        self._run = run
        self._publication: Publication | None = None

    def save(self, content: Content) -> None:
        """Save; a failure is a warning. With `checkpoint.local_dir` it is still to be published."""
        self.settle()
        if self._run.config.checkpoint.local_dir is None:
            self._save_directly(content)
            return
        try:
            _check_space(self._run, content, on_nodes=True)
            self._publication = save_locally(self._run, content)
        except SaveFailed as error:
            self._count(content.state.step, error)

    def save_last(self, content: Content) -> None:
        """The last save of a run, straight into its folder: tried again before it is given up."""
        self.settle()
        for attempt in range(LAST_ATTEMPTS):
            if attempt:
                time.sleep(PAUSE_SECONDS)
            self._save_directly(content)
            if self.failure is None:
                return

    def settle(self) -> None:
        """Wait for the checkpoint that is being published, if one is."""
        publication, self._publication = self._publication, None
        if publication is None:
            return
        try:
            self._succeeded(publication.settle())
        except SaveFailed as error:
            self._count(publication.step, error)

    def _save_directly(self, content: Content) -> None:
        try:
            _check_space(self._run, content)
            self._succeeded(save(self._run, content))
        except SaveFailed as error:
            self._count(content.state.step, error)

    def _succeeded(self, folder: Path) -> None:
        self.newest, self.failure = folder, None

    def _count(self, step: int, error: SaveFailed) -> None:
        self.failed_saves += 1
        self.failure = str(error)
        logger.warning("THE CHECKPOINT AFTER STEP %d WAS NOT SAVED: %s", step, error)


def _check_space(run: Run, content: Content, *, on_nodes: bool = False) -> None:
    """Raise `SaveFailed` on all ranks where `content` fits neither now nor after a clearing up.

    It has to fit into the run's folder, and `on_nodes` onto their own disks too. What killed saves
    left of this step and earlier ones is removed where it is in the way.
    """
    checkpoints = checkpoints_folder(run)
    num_bytes = own_bytes(content.generator, content.discriminator, content.ema)
    shortage = find_shortage(checkpoints, num_bytes)
    if shortage is not None:
        if dist.get_rank() == 0:
            with contextlib.suppress(OSError):  # the shortage that stays is told to all
                remove_partial(checkpoints, up_to=content.state.step)
        shortage = find_shortage(checkpoints, num_bytes)
    if shortage is None and on_nodes:
        shortage = find_shortage(local_root(run), num_bytes, on_each_node=True)
    if shortage is not None:
        raise SaveFailed(f"{shortage}, so nothing was written")


def prepare_local_dir(run: Run) -> None:
    """Empty the run's part of `checkpoint.local_dir` on every node, if it has one.

    One rank of each node does it, while the others wait. Raises `ValueError`, on all ranks
    together, where there is none to be had.
    """
    if run.config.checkpoint.local_dir is None:
        return
    root = local_root(run)
    with failing_together():
        if os.environ.get("LOCAL_RANK", "0") != "0":
            return
        shutil.rmtree(root, ignore_errors=True)  # of a run that was killed
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"checkpoint.local_dir: {root} cannot be made ({error}): name a folder on a disk "
                "of every node"
            ) from error
