"""How long training stands still for a checkpoint: the trainer's saves against DeepSpeed's.

The SAME engines are saved in turns, in the same processes: by DeepSpeed's `save_checkpoint` alone,
by it and a sync of its files, by the trainer into the run's folder, and by the trainer in two
steps. Each figure is the time from when all ranks begin to when the last one may go on. What a save
left to the operating system is written out before the next one, off the clock, and so is what the
trainer's threads publish, which a run does beside its steps.

DeepSpeed alone writes neither averages nor random states, computes no checksum, and leaves its
files to the operating system: a power cut may take a checkpoint that it has said to be written. It
writes the frozen encoder every time, the trainer once a run.
"""

from __future__ import annotations

import os
import pickle
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from vqrae_ds import manifest
from vqrae_ds.benchmarks import bare_loop
from vqrae_ds.benchmarks.launch import choose_machine, run_ranks
from vqrae_ds.benchmarks.step_runs import SIZES, Size, write_run
from vqrae_ds.benchmarks.table import Report, Row, describe_machine
from vqrae_ds.checkpoint import Content, Saver, TrainState

if TYPE_CHECKING:
    from vqrae_ds.config import Run

# Large enough for the disk to matter, small enough for the memory of a laptop.
CHECKPOINT_SIZES = {
    "cpu": Size(512, 8, 8, 64, 8, 64, micro_batch=2, num_workers=0),
    "cuda": SIZES["cuda"],
}
STEPS = 2  # before the first save: the optimizers have their states by then
DEEPSPEED = "DeepSpeed save_checkpoint"


class Found(NamedTuple):
    """Seconds of each save by its kind, seconds until one was published, and its bytes."""

    seconds: dict[str, list[float]]
    until_published: list[float]
    num_bytes: int


def measure_checkpoint(
    prepare: Callable[[Run], Any], folder: Path, local_dir: Path, rounds: int
) -> Report:
    """Run the ranks and report; checkpoints are written below `folder` and `local_dir`.

    `prepare` makes a `vqrae_ds.preparation.Setup` of a run. Nothing that is written stays.
    """
    machine = choose_machine()
    with (
        tempfile.TemporaryDirectory(dir=folder) as there,
        tempfile.TemporaryDirectory(dir=local_dir) as local,
    ):
        size = CHECKPOINT_SIZES[machine.device_type]
        run = write_run(Path(there), "stage1_gan", machine, STEPS, size)
        run_ranks(machine, _measure_rank, prepare, run, Path(local), rounds, Path(there))
        found: Found = pickle.loads((Path(there) / "found.pickle").read_bytes())
    described = f"{machine.num_ranks} ranks on {describe_machine(machine.device_type)}"
    return Report("checkpoint", described, _rows(found), _details(found, rounds))


def _measure_rank(
    rank: int, prepare: Callable[[Run], Any], run: Run, local: Path, rounds: int, folder: Path
) -> None:
    setup = prepare(run)
    for batch in islice(setup.batches, STEPS):
        images_B3HW = batch.images_B3HW.to(setup.ranks.device)
        bare_loop.gan_step(setup.generator, setup.discriminator, images_B3HW)
    reached = TrainState(STEPS)
    content = Content(setup.generator, setup.discriminator, reached, pretrained=setup.pretrained)
    direct, in_two_steps = Saver(run), Saver(_with_local_dir(run, local))
    theirs, ours = folder / "deepspeed", Path(run.config.run.output_dir) / "checkpoints"

    def save_by_deepspeed() -> None:
        for tag, engine in (("generator", setup.generator), ("gan", setup.discriminator)):
            engine.save_checkpoint(str(theirs), tag=tag)

    def save_by_deepspeed_and_sync() -> None:
        save_by_deepspeed()
        for path in sorted(theirs.rglob("*.pt"))[rank :: dist.get_world_size()]:
            manifest.sync(path)

    saves = {
        "deepspeed": save_by_deepspeed,
        "deepspeed_synced": save_by_deepspeed_and_sync,
        "direct": lambda: direct.save(content),
        "two_steps": lambda: in_two_steps.save(content),
    }
    found = Found({kind: [] for kind in saves}, [], 0)
    for number in range(rounds + 1):  # the first of each kind is not counted
        for kind, save in saves.items():
            seconds, published = _timed(save), _timed(in_two_steps.settle)
            if number:
                found.seconds[kind].append(seconds)
            if number and kind == "two_steps":
                found.until_published.append(seconds + published)
            if kind == "direct":
                written = manifest.read_manifest(manifest.find_step_folder(ours))
                found = found._replace(num_bytes=written.num_bytes)
            _clear(theirs, ours)
    assert direct.failed_saves == in_two_steps.failed_saves == 0, "only successes are compared"
    if rank == 0:
        (folder / "found.pickle").write_bytes(pickle.dumps(found))


def _with_local_dir(run: Run, local: Path) -> Run:
    checkpoint = run.config.checkpoint.model_copy(update={"local_dir": str(local)})
    return run._replace(config=run.config.model_copy(update={"checkpoint": checkpoint}))


def _timed(save: Callable[[], None]) -> float:
    """Seconds between two moments at which all ranks are here."""
    _meet()
    start = time.perf_counter()
    save()
    _meet()
    return time.perf_counter() - start


def _meet() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()


def _clear(*folders: Path) -> None:
    """No file of one save is in the way of the next."""
    dist.barrier()
    if dist.get_rank() == 0:
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        os.sync()
    dist.barrier()


def _rows(found: Found) -> list[Row]:
    """Medians over the rounds."""
    median = {kind: statistics.median(seconds) for kind, seconds in found.seconds.items()}
    unit = "s a save"
    synced = f"{DEEPSPEED} and fsync"
    return [
        Row("stall_direct", median["direct"], median["deepspeed"], DEEPSPEED, unit),
        Row("stall_direct_synced", median["direct"], median["deepspeed_synced"], synced, unit),
        Row("stall_two_steps", median["two_steps"], median["deepspeed"], DEEPSPEED, unit),
    ]


def _details(found: Found, rounds: int) -> dict[str, Any]:
    return {
        "rounds": rounds,
        "megabytes": round(found.num_bytes / 1e6, 1),
        "seconds_until_published": round(statistics.median(found.until_published), 4),
        "quartiles_of_seconds": {
            kind: [round(q, 4) for q in statistics.quantiles(s, n=4, method="inclusive")]
            for kind, s in found.seconds.items()
        },
    }
