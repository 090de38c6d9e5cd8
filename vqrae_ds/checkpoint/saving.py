"""Write a checkpoint: DeepSpeed's files, the trainer's own, each on the disk, then the manifest.

No error of a file system is raised while the ranks write: there are collectives among the writes.
They compare afterwards, and what one of them could not write none of them keeps.
"""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from vqrae_ds import manifest
from vqrae_ds.checkpoint import frozen, retention
from vqrae_ds.checkpoint.names import RUN, TRAINER_STATE, TrainState, random_file, step_folder
from vqrae_ds.checkpoint.space import in_units
from vqrae_ds.checkpoint.writing import Failure, RankWriter
from vqrae_ds.config import Run
from vqrae_ds.config.resuming import record
from vqrae_ds.conversion.rank_files import DISCRIMINATOR, GENERATOR, MODEL_CONFIG, average_file
from vqrae_ds.models.vqrae import config_json
from vqrae_ds.ranks import from_rank_0, gather
from vqrae_ds.sharding.ema import WeightAverage

logger = logging.getLogger(__name__)


class SaveFailed(RuntimeError):
    """A checkpoint could not be written, on all ranks alike, and nothing of it is left."""


class Content(NamedTuple):
    """What goes into a checkpoint.

    `extra` is anything that JSON can hold. `pretrained` is what `write_pretrained` gave: without
    it, or where the file is gone, the run's frozen pretrained weights are written now. Unless it
    `replaces_old` ones all other checkpoints stay, whatever the configuration says.
    """

    generator: Any
    discriminator: Any
    state: TrainState
    ema: WeightAverage | None = None
    extra: dict[str, Any] | None = None
    pretrained: manifest.FileRecord | None = None
    replaces_old: bool = True


def save(run: Run, content: Content) -> Path:
    """Write a checkpoint, straight into the run's folder; every rank calls it.

    Returns its folder, complete. Raises `SaveFailed`, on all ranks together, where a file of any of
    them cannot be written.
    """
    start = time.perf_counter()
    content = with_pretrained(run, content)
    folder = step_folder(run, content.state.step)
    writer = begin(folder)
    write_files(run, writer, content)
    shares = agree(writer, folder)
    files = {name: r for share in shares for name, r in share.items()}
    with publishing(folder, writer):
        if dist.get_rank() == 0:
            writer.add_unrecorded(set(files))
        if dist.get_rank() == 0 and writer.failure is None:
            written = describe(run, content, files | writer.records)
            publish(run, folder, written, writer, removes_old=content.replaces_old)
    size = in_units(sum(record.size for record in files.values()))
    logger.info("checkpoint %s (%s in %.1f s)", folder, size, time.perf_counter() - start)
    return folder


def with_pretrained(run: Run, content: Content) -> Content:
    """`content` with the record of the run's frozen pretrained weights, which are on the disk.

    Every rank calls it. Raises `SaveFailed`, on all ranks together, where they cannot be written.
    """
    try:
        known = frozen.write_pretrained(run, content.generator, content.pretrained)
    except (OSError, RuntimeError) as error:  # of rank 0, and what its peers hear of it
        raise SaveFailed(f"the frozen weights of the run: {error}") from error
    return content._replace(pretrained=known)


def begin(folder: Path) -> RankWriter:
    """A writer into an empty `folder`, which rank 0 makes; every rank calls it."""
    writer = RankWriter(folder)
    if dist.get_rank() == 0:
        with writer.attempt(folder):
            retention.remove(folder)  # left by a save that was interrupted
            folder.mkdir(parents=True)
    dist.barrier()
    return writer


def write_files(run: Run, writer: RankWriter, content: Content) -> None:
    """All that this rank writes, below the folder of `writer`; every rank calls it."""
    folder, state = writer.folder, content.state
    for engine, tag in ((content.generator, GENERATOR), (content.discriminator, DISCRIMINATOR)):
        if engine is not None:
            with writer.replacing_writes_of(engine):
                engine.save_checkpoint(
                    str(folder),
                    tag=tag,
                    save_latest=False,
                    exclude_frozen_parameters=tag == GENERATOR,
                )
    frozen.write_others(writer, folder / GENERATOR, content.generator)
    writer.save(_random_state(), random_file(folder))
    if content.ema is not None:
        writer.save(content.ema.state_dict(), average_file(folder, dist.get_rank()))
    if dist.get_rank() != 0:
        return
    with writer.attempt(folder / MODEL_CONFIG):
        writer.write_text(folder / MODEL_CONFIG, config_json(run.config.model))
    writer.write_text(folder / RUN, json.dumps(record(run), indent=2) + "\n")
    saved = {**state._asdict(), "stage": run.config.stage, "extra": content.extra or {}}
    writer.write_text(folder / TRAINER_STATE, json.dumps(saved))


def agree(writer: RankWriter, folder: Path) -> list[dict[str, manifest.FileRecord]]:
    """The records of all ranks, in their order; every rank calls it.

    Raises `SaveFailed` where any of them failed, and removes `folder`.
    """
    found = gather((writer.failure, writer.records))
    failures = [failure for failure, _ in found if failure is not None]
    if failures:
        abandon(folder)
        raise SaveFailed(_in_words(failures))
    return [records for _, records in found]


@contextlib.contextmanager
def publishing(folder: Path, writer: RankWriter) -> Iterator[None]:
    """What rank 0 does inside alone has failed for all if `writer` has; every rank enters it."""
    yield
    failure = from_rank_0(lambda: writer.failure)
    if failure is not None:
        abandon(folder)
        raise SaveFailed(str(failure))


def describe(
    run: Run, content: Content, files: dict[str, manifest.FileRecord]
) -> manifest.Manifest:
    """The manifest of a checkpoint that consists of `files`."""
    packages, sizes = ("torch", "deepspeed", "transformers"), run.schedule.batch
    return manifest.Manifest(
        step=content.state.step,
        stage=run.config.stage,
        world_size=dist.get_world_size(),
        versions={package: version(package) for package in packages},
        files=files,
        frozen=content.pretrained,
        layout=manifest.Layout(sizes.data_size, sizes.tensor_size),
    )


def publish(
    run: Run,
    folder: Path,
    written: manifest.Manifest,
    writer: RankWriter,
    *,
    removes_old: bool,
) -> None:
    """Rank 0 alone: vouch for what all ranks have written and synced, and clear up.

    The failure of the former is kept by `writer`. That of the latter is a warning.
    """
    with writer.attempt(folder):
        damage = manifest.find_damage(folder, written, checksums=False)
        if damage:
            raise OSError(f"not as it was written: {'; '.join(damage)}")
        # A power cut may take the name of a file whose bytes are safe.
        above = {folder.parent, folder.parent.parent}
        for inner in {(folder / name).parent for name in written.files} | above:
            manifest.sync(inner)
    if writer.failure is None:
        with writer.attempt(folder / manifest.MANIFEST_NAME):
            manifest.write_manifest(folder, written)
    if writer.failure is not None:
        return
    try:
        retention.remove_partial(folder.parent, up_to=written.step)
        if removes_old:
            retention.remove_old(folder, run.config.checkpoint)
    except (OSError, ValueError) as error:  # ValueError: one that cannot be read any more
        logger.warning("older checkpoints are still there: %s", error)


def abandon(folder: Path) -> None:
    """Rank 0 removes what there is of a checkpoint; nobody writes there any more."""
    if dist.get_rank() == 0:
        with contextlib.suppress(OSError):  # it has no manifest, or the error is that of its own
            retention.remove(folder)


def _in_words(failures: list[Failure]) -> str:
    more = f" (and {len(failures) - 3} more ranks)" if len(failures) > 3 else ""
    return "; ".join(map(str, failures[:3])) + more


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state
