"""Ranks killed at random moments of a run that saves at every second step: nothing is lost by it.

One half dies while it starts: as it hashes, resumes, or writes its frozen weights. The other half
dies among its steps and saves. Every second start saves over a local folder. A few kills by
default; VQRAE_KILL_DRILL=100 makes it a hundred, for which pytest needs -o timeout=7200,
VQRAE_KILL_SEED other moments.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.launching import make_inputs, ranks_of, started, train, write_configs
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint
from vqrae_ds.evaluation.summary import METRICS_FILE, read_metrics
from vqrae_ds.manifest import complete_steps, find_damage, find_step_folder, read_manifest
from vqrae_ds.stopping import DONE

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("VQRAE_KILL_DRILL", "3"))
SEED = int(os.environ.get("VQRAE_KILL_SEED", "0"))
SAVE_EVERY, STEPS = 2, 14 + 12 * KILLS  # the GAN begins at 10
DEADLINE_SECONDS, END_SECONDS = 180, 120  # in which a start makes a step, and a job is over
STRAIGHT_SECONDS = 240 + 2 * STEPS
START_SECONDS = 6.0  # from the first process of a rank to its first step, about
LONGEST_SECONDS = 3.0  # from the first step of a start to the kill: several saves


def settings(run: Path) -> list[str]:
    return [
        f"run.output_dir={run}",
        f"run.total_steps={STEPS}",
        "deepspeed.train_micro_batch_size_per_gpu=1",  # two micro batches a step
        f"checkpoint.every_steps={SAVE_EVERY}",
        "data.validation=null",
        "ema.decay=0.9",
    ]


def last_step(run: Path) -> int:
    """The last step that was logged; a line that was cut short by a kill does not count."""
    with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
        return read_metrics(run)[-1]["step"]
    return 0


def logged_at(run: Path) -> int:
    """When the log was written to."""
    path = run / METRICS_FILE
    return path.stat().st_mtime_ns if path.exists() else 0


def newest_step(run: Path) -> list[Path]:
    """The newest complete checkpoint of the run, if there is one."""
    return complete_steps(run / "checkpoints")[:1]


def resumed_from(log: str) -> list[Path]:
    return [Path(path) for path in re.findall(r"resumed from (\S+) at step", log)]


def wait_until(is_true: Callable[[], bool], launcher: subprocess.Popen, log: Path) -> None:
    """Wait until it is, or the run has ended."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while launcher.poll() is None and not is_true():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.02)


def kill_somewhere(folder: Path, run: Path, moments: random.Random, local: list[str]) -> bool:
    """Start the run and kill one rank of it, or all; false where it came to its end before."""
    before, newest, amid_start = last_step(run), newest_step(run), moments.random() < 0.5
    log_path = folder / "drill.log"
    with started(folder, 1, *settings(run), *local, log=log_path) as launcher:
        wait_until(lambda: len(ranks_of(launcher)) == 2, launcher, log_path)
        if amid_start:
            time.sleep(moments.uniform(0, START_SECONDS))
        else:
            wait_until(lambda: last_step(run) not in (0, before), launcher, log_path)
            time.sleep(moments.uniform(0, LONGEST_SECONDS))
            assert resumed_from(log_path.read_text()) == newest
        assert resumed_from(log_path.read_text()) in ([], newest)
        if launcher.poll() is not None:
            return False
        every = psutil.Process(launcher.pid).children(recursive=True)
        ranks = ranks_of(launcher)
        for rank in ranks if moments.random() < 0.5 else [moments.choice(ranks or [None])]:
            with contextlib.suppress(psutil.NoSuchProcess, AttributeError):
                rank.send_signal(signal.SIGKILL)
        launcher.wait(timeout=END_SECONDS)
        _, alive = psutil.wait_procs(every, timeout=20)
        assert not alive, "no process outlives the job"
        return True


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(tmp_path, lpips_weights):
    make_inputs(tmp_path)
    write_configs(tmp_path, lpips_weights)
    straight, run = tmp_path / "straight", tmp_path / "killed"
    train(tmp_path, 1, *settings(straight), seconds=STRAIGHT_SECONDS)
    moments, kills = random.Random(SEED), 0
    intervals, local_dir = 1, f"checkpoint.local_dir={tmp_path / 'node'}"
    while kills < KILLS:
        before, local = logged_at(run), [local_dir] * (kills % 2)
        if not kill_somewhere(tmp_path, run, moments, local):
            break
        kills += 1
        if logged_at(run) != before:  # else the steps that count are those of a start before it
            intervals = 1 + len(local)
        saved = 0  # a kill may come before the first checkpoint
        for folder in newest_step(run):
            saved = read_manifest(folder).step
            assert find_damage(folder, read_manifest(folder)) == []
        assert last_step(run) - saved <= intervals * SAVE_EVERY, "no more than promised is lost"
    assert kills >= min(KILLS, 3), f"the run was over after {kills} kills"
    newest = newest_step(run)
    assert resumed_from(train(tmp_path, 1, *settings(run), seconds=STRAIGHT_SECONDS)) == newest
    assert (run / DONE).exists()

    ours, theirs = find_step_folder(run), find_step_folder(straight)
    assert read_manifest(ours).step == read_manifest(theirs).step == STEPS
    for engine in ("generator", "discriminator"):
        for averages in (False, True) if engine == "generator" else (False,):
            mine = ZeroCheckpoint(ours / engine, averages=averages)
            other = ZeroCheckpoint(theirs / engine, averages=averages)
            assert mine.names() == other.names()
            for name in other.names():
                assert mine.read(name).equal(other.read(name)), name
