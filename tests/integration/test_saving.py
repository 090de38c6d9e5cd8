"""Saves that fail, in real runs of two ranks whose disk fills up: in one step, and in two."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist

from tests.conftest import ROOT
from tests.disks import Level, leave, mounted
from tests.launching import ADAMW
from tests.tiny import GAN, make_run, save_initial
from vqrae_ds import manifest
from vqrae_ds.benchmarks.launch import Machine, run_ranks
from vqrae_ds.config import Run
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint
from vqrae_ds.data.shard_writing import find_images, write_shards
from vqrae_ds.evaluation.summary import read_metrics

pytestmark = pytest.mark.slow

TWO_RANKS = Machine(2, "cpu")
STEPS = 33
CHECKPOINT_INODES = 21  # three folders and 18 files, the manifest among them
CHECKPOINT_BYTES = 1_130_000
ENOUGH = Level()
BY_FILES = [Level(inodes=number) for number in range(CHECKPOINT_INODES - 1)]
BY_BYTES = [Level(num_bytes=CHECKPOINT_BYTES * tenths // 10) for tenths in range(10)]
DIRECT_LEVELS = [ENOUGH, *BY_FILES, ENOUGH, *BY_BYTES, ENOUGH]  # and what is left of the run
NO_RECORDS = None  # there is room, but rank 1 cannot tell rank 0 what it copied
LOCAL_LEVELS = [ENOUGH, *BY_FILES, NO_RECORDS, ENOUGH]
RECORDS = "records_rank_00001.json"
WARNING = re.compile(r"AFTER STEP (\d+) WAS NOT SAVED: (.*)")


class Outcome(NamedTuple):
    """A run folder, its log, and what was on the disk after each save."""

    run: Path
    log: str
    seen: list[dict[str, Any]]

    def failures(self) -> dict[int, str]:
        """What was said of each step whose save failed."""
        return {int(step): text for step, text in WARNING.findall(self.log)}


def run_on(folder: Path, output: Path, steps: int = STEPS, **checkpoint: Any) -> Run:
    """Stage 1 with GAN and averages, on photographs; saves after every step."""
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


def train_while_the_disk_fills(
    rank: int, run: Run, folder: Path, disk: Path, levels: list[Level | None]
) -> None:
    """Train; the disk has `levels[i]` left when the save after step i + 1 has begun.

    Each rank has a local disk of its own, where the run has one at all, as on two nodes.
    """
    from vqrae_ds.checkpoint import saver
    from vqrae_ds.preparation import prepare
    from vqrae_ds.train import TrainingStopped, train

    saver.PAUSE_SECONDS = 0.1
    logging.basicConfig(filename=folder / f"rank{rank}.log", level=logging.INFO, force=True)
    local_dir = run.config.checkpoint.local_dir
    if local_dir is not None:
        os.environ["LOCAL_RANK"] = "0"
        update = {"local_dir": f"{local_dir}/node{rank}"}
        checkpoint = run.config.checkpoint.model_copy(update=update)
        run = run._replace(config=run.config.model_copy(update={"checkpoint": checkpoint}))
    setup = prepare(run)
    checkpoints, seen, coming = Path(run.config.run.output_dir) / "checkpoints", [], iter(levels)
    save_checkpoint = setup.generator.save_checkpoint

    def save_while_others_write(*args: Any, **kwargs: Any) -> None:
        if rank == 0:
            level = next(coming, ENOUGH)
            leave(disk, level or ENOUGH)
            if level is NO_RECORDS:
                folders = manifest.step_folders(checkpoints)
                (folders[max(folders)] / RECORDS).mkdir()
        save_checkpoint(*args, **kwargs)

    def looking_between_steps() -> Iterator[Any]:
        for batch in setup.batches:
            dist.barrier()
            if rank == 0:
                seen.append(look_at(checkpoints))
                if local_dir is None:  # else the copies are still on their way
                    leave(disk, ENOUGH)
            dist.barrier()
            yield batch

    setup.generator.save_checkpoint = save_while_others_write
    try:
        train(run, setup._replace(batches=looking_between_steps()))
    except TrainingStopped as stop:
        (folder / f"stopped{rank}").write_text(str(stop))
    if rank == 0:
        leave(disk, ENOUGH)
        seen.append(look_at(checkpoints))
        (folder / "seen.json").write_text(json.dumps(seen))


def look_at(checkpoints: Path) -> dict[str, Any]:
    """The steps that are complete and those that are not, and all damage.

    A thread that publishes may remove an old checkpoint meanwhile: that one is gone, not damaged.
    """
    steps = manifest.step_folders(checkpoints)
    damage: dict[int, list[str]] = {}
    for step, folder in steps.items():
        if (folder / manifest.MANIFEST_NAME).exists():
            try:
                damage[step] = manifest.find_damage(folder, manifest.read_manifest(folder))
            except ValueError as error:
                damage[step] = [str(error)]
    partial = [step for step in steps if step not in damage]

    def is_removing() -> bool:
        left = [step for step in partial if steps[step].exists()]
        return len(left) > 1 or bool(left) and min(left) < max(damage, default=0)

    deadline = time.monotonic() + 2  # the manifest of one that is removed is the first to go
    while time.monotonic() < deadline and is_removing():
        time.sleep(0.02)
    there = {step for step in damage if (steps[step] / manifest.MANIFEST_NAME).exists()}
    return {
        "complete": sorted(there),
        "partial": sorted(step for step in partial if steps[step].exists()),
        "damage": sum((damage[step] for step in there), []),
    }


def train_undisturbed(rank: int, run: Run) -> None:
    from vqrae_ds.preparation import prepare
    from vqrae_ds.train import train

    train(run, prepare(run))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saving")
    save_initial(folder / "initial")
    photographs = find_images(ROOT / "tests/data/photos/train")
    write_shards(photographs, folder / "train", samples_per_shard=10, root=ROOT)
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder) -> Path:
    """The last checkpoint of a run without a failure."""
    run_ranks(TWO_RANKS, train_undisturbed, run_on(folder, folder / "undisturbed"))
    return manifest.find_step_folder(folder / "undisturbed")


def outcome_of(
    folder: Path, name: str, levels: list[Level | None], steps: int = STEPS, **checkpoint: Any
) -> Iterator[Outcome]:
    (folder / name).mkdir()
    with mounted(folder / name / "disk") as disk:
        run = run_on(folder, disk / "run", steps, **checkpoint)
        run_ranks(TWO_RANKS, train_while_the_disk_fills, run, folder / name, disk, levels)
        log = (folder / name / "rank0.log").read_text()
        seen = json.loads((folder / name / "seen.json").read_text())
        yield Outcome(disk / "run", log, seen)


@pytest.fixture(scope="module")
def direct(folder) -> Iterator[Outcome]:
    yield from outcome_of(folder, "direct", DIRECT_LEVELS)


@pytest.fixture(scope="module")
def in_two_steps(folder) -> Iterator[Outcome]:
    local_dir = str(folder / "nodes")
    yield from outcome_of(folder, "in_two_steps", LOCAL_LEVELS, local_dir=local_dir)


def steps_without(levels: list[Level | None]) -> list[int]:
    """The steps whose saves must fail."""
    return [step for step, level in enumerate(levels, start=1) if level != ENOUGH]


def assert_trained_to_the_end(outcome: Outcome, undisturbed: Path) -> None:
    ours = manifest.find_step_folder(outcome.run)
    assert manifest.read_manifest(ours).step == STEPS
    assert manifest.read_manifest(ours).layout == manifest.Layout(dp=2, tp=1)
    for engine in ("generator", "discriminator"):
        mine, theirs = ZeroCheckpoint(ours / engine), ZeroCheckpoint(undisturbed / engine)
        assert mine.tensors.keys() == theirs.tensors.keys()
        for name in theirs.tensors:
            assert torch.equal(mine.read(name), theirs.read(name)), name


def test_the_disk_fills_at_every_file_and_training_goes_on_to_its_end(direct, undisturbed):
    assert_trained_to_the_end(direct, undisturbed)


def test_each_failure_is_told_with_its_rank_file_and_error(direct):
    failures = direct.failures()
    assert sorted(failures) == steps_without(DIRECT_LEVELS)
    for text in failures.values():
        assert re.match(r"rank [01]: /\S+: No space left on device", text), text
    everything = "\n".join(failures.values())
    for what in (
        r"rank 0: \S+/zero_pp_rank_0_mp_rank_00_model_states.pt",
        r"rank 1: \S+/zero_pp_rank_1_mp_rank_00_model_states.pt",
        r"rank [01]: \S+/generator/zero_pp_rank_\d_mp_rank_00_optim_states.pt",
        r"rank 0: \S+/zero_to_fp32.py",
        r"rank [01]: \S+/(ema|rng)_rank_\d{5}.pt",
        # Which of rank 0's small files comes too late depends on how far rank 1 is.
        r"rank 0: \S+/(model_config|run|trainer_state).json",
        r"rank 0: \S+/manifest.json",
    ):
        assert re.search(what, everything), what


def test_nothing_of_a_failed_save_is_left_and_what_there_was_is_intact(direct):
    newest = 0
    for step, found in enumerate(direct.seen):
        if step and step not in steps_without(DIRECT_LEVELS):
            newest = step
        assert not found["partial"] and not found["damage"]
        assert (found["complete"] or [0])[-1] == newest


def test_failed_saves_are_counted(direct):
    entries = {e["step"]: e["checkpoint/failed_saves"] for e in read_metrics(direct.run)}
    failed = steps_without(DIRECT_LEVELS)
    assert entries == {step: sum(f < step for f in failed) for step in range(1, STEPS + 1)}
    assert f"{len(failed)} SAVES FAILED" in direct.log


def test_a_disk_that_fills_while_threads_publish(in_two_steps, undisturbed):
    assert_trained_to_the_end(in_two_steps, undisturbed)
    assert sorted(in_two_steps.failures()) == steps_without(LOCAL_LEVELS)
    everything = "\n".join(in_two_steps.failures().values())
    for what in ("rank 0: ", "rank 1: ", "mp_rank_00_optim_states"):
        assert what in everything, what
    blocked = LOCAL_LEVELS.index(NO_RECORDS) + 1
    assert re.search(rf"rank 1: \S+/{RECORDS}\S*: Is a directory", in_two_steps.failures()[blocked])
    last = read_metrics(in_two_steps.run)[-1]
    assert last["checkpoint/failed_saves"] == len(steps_without(LOCAL_LEVELS))
    for step, found in enumerate(in_two_steps.seen):
        assert not found["damage"] and set(found["partial"]) <= {step}
    assert not in_two_steps.seen[-1]["partial"]


def test_two_steps_leave_the_same_checkpoint_and_nothing_on_the_nodes(in_two_steps, direct, folder):
    ours, theirs = (manifest.find_step_folder(outcome.run) for outcome in (in_two_steps, direct))
    assert manifest.list_files(ours) == manifest.list_files(theirs)
    before = manifest.find_step_folders(in_two_steps.run)[1]  # the last one that was published
    assert manifest.list_files(before) == manifest.list_files(theirs)
    assert not [path for path in (folder / "nodes").rglob("*") if path.is_file()]


def test_the_last_save_is_tried_again(folder):
    levels = [*[ENOUGH] * 4, Level(inodes=3), Level(inodes=5), ENOUGH]
    for outcome in outcome_of(folder, "again", levels, steps=5):
        assert manifest.read_manifest(manifest.find_step_folder(outcome.run)).step == 5
        assert len(WARNING.findall(outcome.log)) == 2


def test_a_run_whose_last_save_fails_says_so(folder):
    levels = [*[ENOUGH] * 4, *[Level(inodes=3)] * 3]
    for outcome in outcome_of(folder, "stopped", levels, steps=5):
        for rank in range(2):
            stopped = (folder / "stopped" / f"stopped{rank}").read_text()
            assert stopped.startswith("the weights after step 5, the last, could not be saved: ")
            assert "No space left on device" in stopped
        assert outcome.seen[-1] == {"complete": [3, 4], "partial": [], "damage": []}
