"""Saves that fail in real runs of two ranks: full disks, kills, in one step and in two."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.conftest import ROOT
from tests.launching import ADAMW
from tests.tiny import GAN, make_run, save_initial
from vqrae_ds import manifest
from vqrae_ds.benchmarks.launch import Machine, run_ranks
from vqrae_ds.config import Run
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint
from vqrae_ds.data.index import find_images, write_shards
from vqrae_ds.evaluation.summary import read_metrics

pytestmark = pytest.mark.slow

TWO_RANKS = Machine(2, "cpu")
DISK_BYTES, DISK_INODES = 64 << 20, 10_000


class Level(NamedTuple):
    """What is left of a disk when a save has begun; None: enough."""

    inodes: int | None = None
    num_bytes: int | None = None


def set_level(disk: Path, level: Level) -> None:
    """Make the tmpfs so small that no more than `level` is free."""
    used = os.statvfs(disk)
    options = [f"nr_inodes={DISK_INODES}", f"size={DISK_BYTES}"]
    if level.inodes is not None:
        options[0] = f"nr_inodes={used.f_files - used.f_ffree + level.inodes}"
    if level.num_bytes is not None:
        blocks = used.f_blocks - used.f_bfree + -(-level.num_bytes // used.f_frsize)
        options[1] = f"size={blocks * used.f_frsize}"
    subprocess.run(["mount", "-o", f"remount,{','.join(options)}", str(disk)], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, whose size can be changed."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES},nr_inodes={DISK_INODES}"]
    done = subprocess.run([*mount, "tmpfs", str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)


def run_on(folder: Path, output: Path, steps: int, **checkpoint: Any) -> Run:
    """Stage 1 with GAN and averages, on photographs, that saves after every step."""
    return make_run(
        folder,
        1,
        losses={"perceptual": None, "adversarial": {"weight": 0.1, **GAN}},
        deepspeed=ADAMW,
        ema={"decay": 0.9},
        data={"train": str(folder / "train")},
        run={"output_dir": str(output), "total_steps": steps, "collective_timeout_minutes": 1},
        checkpoint={"every_steps": 1, "keep_last": 2, **checkpoint},
        monitor={"log_every_steps": 1},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_initial(tmp_path / "initial")
    photographs = find_images(ROOT / "tests/data/photos/train")
    write_shards(photographs, tmp_path / "train", samples_per_shard=10, root=ROOT)
    return tmp_path


def train_on_levels(rank: int, run: Run, folder: Path, levels: list[Level]) -> None:
    """Train; the disk has `levels[i]` left when the save after step i + 1 has begun.

    What is on the disk after each save is written down.
    """
    import vqrae_ds.checkpoint.saver
    from vqrae_ds.preparation import prepare
    from vqrae_ds.train import train

    vqrae_ds.checkpoint.saver.PAUSE_SECONDS = 0.1
    logging.basicConfig(filename=folder / f"rank{rank}.log", level=logging.INFO, force=True)
    logging.getLogger("vqrae_ds").setLevel(logging.INFO)
    disk = folder / "disk"
    setup = prepare(run)
    seen: list[dict] = []
    generator, saves = setup.generator, iter(levels)
    save_checkpoint = generator.save_checkpoint

    def save_as_the_disk_fills(*args: Any, **kwargs: Any) -> None:
        if rank == 0:
            set_level(disk, next(saves, Level()))
        save_checkpoint(*args, **kwargs)

    def between_the_saves() -> Iterator[Any]:
        for batch in setup.batches:
            dist.barrier()
            if rank == 0:
                seen.append(look_at(disk / "run" / "checkpoints"))
                set_level(disk, Level())
            dist.barrier()
            yield batch

    generator.save_checkpoint = save_as_the_disk_fills
    train(run, setup._replace(batches=between_the_saves()))
    if rank == 0:
        seen.append(look_at(disk / "run" / "checkpoints"))
        (folder / "seen.json").write_text(json.dumps(seen))


def look_at(checkpoints: Path) -> dict[str, Any]:
    """The steps that are complete and those that are not, and all damage."""
    steps = manifest.step_folders(checkpoints)
    complete = {s: f for s, f in steps.items() if (f / manifest.MANIFEST_NAME).exists()}
    damage = [manifest.find_damage(f, manifest.read_manifest(f)) for f in complete.values()]
    return {"complete": sorted(complete), "all": sorted(steps), "damage": sum(damage, [])}


def train_undisturbed(rank: int, run: Run) -> None:
    from vqrae_ds.preparation import prepare
    from vqrae_ds.train import train

    train(run, prepare(run))


def assert_same_weights(ours: Path, theirs: Path) -> None:
    for engine in ("generator", "discriminator"):
        mine, other = ZeroCheckpoint(ours / engine), ZeroCheckpoint(theirs / engine)
        assert mine.tensors.keys() == other.tensors.keys()
        for name in other.tensors:
            assert torch.equal(mine.read(name), other.read(name)), name


def test_probe(folder, disk):
    levels = [Level()] + [Level(inodes=i) for i in range(0, 22)]
    steps = len(levels) + 1
    run = run_on(folder, disk / "run", steps)
    run_ranks(TWO_RANKS, train_on_levels, run, folder, levels)
    print((folder / "rank0.log").read_text())
    print((folder / "seen.json").read_text())
    for l in (disk / "run" / "checkpoints").rglob("*"):
        print(l)
