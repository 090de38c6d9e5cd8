"""Which checkpoint a run goes on from, or starts from: the newest that is intact, and fits."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch.distributed as dist

from vqrae_ds import manifest
from vqrae_ds.checkpoint.names import RUN, checkpoints_folder
from vqrae_ds.config import Run, check_same_model
from vqrae_ds.config.files import read_json
from vqrae_ds.config.resuming import check_same_run
from vqrae_ds.conversion import record as records
from vqrae_ds.conversion.rank_files import MODEL_CONFIG
from vqrae_ds.ranks import failing_together, from_rank_0, gather

logger = logging.getLogger(__name__)


def find(run: Run) -> Path | None:
    """The newest intact checkpoint of the run, the same on every rank; None for a fresh start.

    The ranks share the reading. Raises `ValueError` on every rank, before anything is built, where
    the newest one belongs to the other stage, or was written with a configuration that a resume
    must not change; and where the run's frozen weights are damaged, which no older checkpoint can
    make up for. It may be of any number of ranks. Where there are checkpoints, and none is intact,
    it raises as well: a run that began again would end by clearing away what may be mended.
    """
    checkpoints, passed_over = checkpoints_folder(run), []
    for folder in from_rank_0(lambda: _published(checkpoints)):
        if damage := _find_damage(folder):
            passed_over.append(f"{folder.name}: {'; '.join(damage)}")
            logger.warning("passing over %s: %s", folder, "; ".join(damage))
            continue
        with failing_together():
            _check_fits(folder, run)
        _check_frozen(folder)
        return folder
    if passed_over:
        raise ValueError(
            f"run.output_dir: {checkpoints} holds no intact checkpoint ({' | '.join(passed_over)}):"
            " put copies in their places, or choose another folder to begin again"
        )
    return None


def resolve_start(run: Run) -> Run:
    """The run with `init.from_run` naming the newest intact step folder of what it named.

    The same on every rank; the ranks share the reading. Raises `ValueError` on every rank, before
    anything is built, where none is intact. Without `init.from_run` nothing changes, but the files
    of `init.model` are held to their checksums.
    """
    start = run.config.init.from_run
    if start is None:
        if run.config.init.model is not None:
            _check_converted(Path(run.config.init.model))
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
            _check_frozen(folder)
            logger.info("weights to start from: %s", folder)
            init = run.config.init.model_copy(update={"from_run": str(folder)})
            return run._replace(config=run.config.model_copy(update={"init": init}))
        logger.warning("passing over %s: %s", folder, "; ".join(damage))
    raise ValueError(f"init.from_run: {start} holds no intact checkpoint: {'; '.join(damage)}")


def _published(checkpoints: Path) -> list[Path]:
    """The step folders with a manifest, readable or not, newest first."""
    folders = manifest.step_folders(checkpoints).values()
    return [folder for folder in folders if os.path.lexists(folder / manifest.MANIFEST_NAME)]


def _check_converted(folder: Path) -> None:
    """Raise `ValueError`, on every rank, where a converted folder is not as it was written."""
    if not from_rank_0(lambda: (folder / records.RECORD_NAME).is_file()):
        logger.info("%s has no %s: it has no checksums", folder, records.RECORD_NAME)
        return
    with failing_together():
        record = records.read_record(folder)
        mine = dict(list(record.files.items())[dist.get_rank() :: dist.get_world_size()])
        if damage := records.find_damage(folder, record._replace(files=mine)):
            raise ValueError(
                f"init.model: {folder} is damaged: {'; '.join(damage)}: convert the checkpoint "
                "again"
            )


def _find_damage(folder: Path) -> list[str]:
    """A line for each file in it that is not what the manifest says; each rank reads its share.

    It is the same on every rank. A manifest that cannot be read is all of the damage.
    """
    found = from_rank_0(lambda: _manifest_or_damage(folder))
    if isinstance(found, str):
        return [found]
    mine = dict(list(found.files.items())[dist.get_rank() :: dist.get_world_size()])
    found = found._replace(files=mine, frozen=None)
    return sum(gather(manifest.find_damage(folder, found)), [])


def _manifest_or_damage(folder: Path) -> manifest.Manifest | str:
    try:
        return manifest.read_manifest(folder)
    except ValueError as error:
        return str(error)


def _check_frozen(folder: Path) -> None:
    """Raise `ValueError`, on all ranks together, where the run's frozen weights are damaged."""
    with failing_together():
        if dist.get_rank() == 0:
            found = manifest.read_manifest(folder)
            damage = manifest.find_damage(folder, found._replace(files={}))
            if damage:
                raise ValueError(
                    f"{damage[0]}; all checkpoints of the run need it. Put a copy in its place: a "
                    "new run with the same init writes the same file"
                )


def _check_fits(folder: Path, run: Run) -> None:
    found = manifest.read_manifest(folder)
    if found.stage != run.config.stage:
        raise ValueError(f"run.output_dir: {folder} belongs to stage {found.stage}: choose another")
    if (folder / RUN).is_file():
        check_same_run(run, read_json(folder / RUN, "run.output_dir"), folder / RUN)
    else:  # of an earlier version
        check_same_model(run.config.model, folder / MODEL_CONFIG, "run.output_dir")
