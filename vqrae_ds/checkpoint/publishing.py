"""A checkpoint in two steps: onto the node's own disk, and from there into the run's folder.

Training waits for the first step alone. The second is a thread of each rank, that takes part in no
collective: it copies the files of its rank, hashes what it copies, syncs it, and leaves the records
beside the files. The thread of rank 0 waits for the records of all ranks and writes the manifest.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
from pathlib import Path

import torch.distributed as dist

from vqrae_ds import manifest
from vqrae_ds.checkpoint import saving
from vqrae_ds.checkpoint.names import local_step_folder, step_folder
from vqrae_ds.checkpoint.saving import Content, SaveFailed
from vqrae_ds.checkpoint.writing import RankWriter
from vqrae_ds.config import Run

POLL_SECONDS = 0.1
VISIBLE_SECONDS = 300  # in which every file system shows rank 0 what another node has written

logger = logging.getLogger(__name__)


def save_locally(run: Run, content: Content) -> Publication:
    """Write a checkpoint onto the disks of the nodes, and begin to publish it; every rank calls it.

    Raises `SaveFailed`, on all ranks together, as `saving.save` does.
    """
    content = saving.with_pretrained(run, content)
    folder = step_folder(run, content.state.step)
    local = local_step_folder(run, content.state.step)
    there = saving.begin(folder)
    writer = RankWriter(local, synced=False)  # read back by this process or by nobody
    writer.failure = there.failure
    with writer.attempt(local):
        shutil.rmtree(local.parent, ignore_errors=True)  # left by a run that was killed
        local.mkdir(parents=True)
    saving.write_files(run, writer, content)
    writer.add_unrecorded(set(writer.records))
    try:
        saving.agree(writer, folder)
    except SaveFailed:
        shutil.rmtree(local.parent, ignore_errors=True)
        raise
    written = saving.describe(run, content, {})
    return Publication(run, written, writer, removes_old=content.replaces_old)


class Publication:
    """The second step of one checkpoint; `settle` ends it. Every rank has one."""

    def __init__(
        self, run: Run, written: manifest.Manifest, local: RankWriter, *, removes_old: bool
    ) -> None:
        self.step, self.folder = written.step, step_folder(run, written.step)
        self._run, self._written, self._local = run, written, local  # `written` lacks the files
        self._writer, self._removes_old = RankWriter(self.folder), removes_old
        self._copied, self._given_up = threading.Event(), threading.Event()
        # A run that fails does not wait for it: the records of its peers may never come.
        self._thread = threading.Thread(target=self._publish, name="publishing", daemon=True)
        self._thread.start()

    def settle(self) -> Path:
        """Wait until the checkpoint is complete; every rank calls it. Returns its folder.

        Raises `SaveFailed`, on all ranks together, where it does not become complete.
        """
        self._copied.wait()
        try:
            saving.agree(self._writer, self.folder)
        except SaveFailed:
            self._give_up()
            saving.abandon(self.folder)  # once more: the thread of rank 0 may have written
            raise
        with saving.publishing(self.folder, self._writer):
            self._thread.join(VISIBLE_SECONDS)
            self._give_up()
        logger.info("checkpoint %s", self.folder)
        return self.folder

    def _give_up(self) -> None:
        self._given_up.set()
        self._thread.join()

    def _publish(self) -> None:
        try:
            self._copy()
            self._copied.set()
            if self._writer.rank == 0 and self._writer.failure is None:
                self._vouch()
        except Exception as error:  # a thread has nobody to raise it to
            logger.exception("publishing %s", self.folder)
            self._writer.fail(self.folder, repr(error))
        finally:
            self._copied.set()

    def _copy(self) -> None:
        local, writer = self._local, self._writer
        for name, record in local.records.items():
            writer.copy(local.folder / name, self.folder / name)
            with writer.attempt(self.folder / name):
                if writer.records.get(name, record) != record:
                    raise OSError(f"{local.folder / name} is not what was written there")
        shutil.rmtree(local.folder.parent, ignore_errors=True)
        if writer.rank != 0 and writer.failure is None:
            path = self._records_of(writer.rank)
            with writer.attempt(path):
                manifest.write_json_atomically(path, writer.records)

    def _vouch(self) -> None:
        """Rank 0: take the records of the others, in the order in which they come."""
        files = dict(self._writer.records)
        waiting = set(range(1, dist.get_world_size()))
        while waiting:
            for rank in sorted(waiting):
                path = self._records_of(rank)
                with self._writer.attempt(path):
                    if path.is_file():
                        records = json.loads(path.read_text())
                        files |= {name: manifest.FileRecord(*r) for name, r in records.items()}
                        path.unlink()
                        waiting.remove(rank)
            if self._writer.failure is not None:
                return
            if waiting and self._given_up.wait(POLL_SECONDS):
                text = f"the records of ranks {sorted(waiting)} are not to be seen"
                self._writer.fail(self.folder, text)
                return
        written = self._written._replace(files=files)
        saving.publish(self._run, self.folder, written, self._writer, removes_old=self._removes_old)

    def _records_of(self, rank: int) -> Path:
        return self.folder / f"records_rank_{rank:05d}.json"
