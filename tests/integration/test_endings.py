"""How runs end that cannot go on, by the real launcher: a rank stands still, numbers stay bad."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.launching import finish, make_inputs, ranks_of, started, wait_for_step, write_configs
from vqrae_ds.config.schema import RunConfig
from vqrae_ds.conversion.consolidate import consolidate
from vqrae_ds.data.index import read_index
from vqrae_ds.data.order import SampleOrder
from vqrae_ds.data.shard_writing import find_images, write_shards
from vqrae_ds.evaluation.summary import read_metrics
from vqrae_ds.manifest import find_step_folder, find_step_folders, read_manifest

pytestmark = pytest.mark.slow

NO_PROGRESS = 45  # seconds, more than a start takes on a busy machine
LAUNCHER_GRACE = 60  # seconds in which the launcher must have ended what is left


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lpips_weights) -> Path:
    folder = tmp_path_factory.mktemp("endings")
    make_inputs(folder)
    write_configs(folder, lpips_weights)
    return folder


def test_a_rank_that_stops_ends_the_job_with_the_stacks_of_its_peers(folder):
    run_folder = folder / "stopped"
    overrides = [
        f"run.output_dir={run_folder}",
        "run.total_steps=100000",
        f"guard.no_progress_seconds={NO_PROGRESS}",
        "checkpoint.every_steps=100000",
    ]
    log_path = folder / "stopped.log"
    with started(folder, 1, *overrides, log=log_path) as launcher:
        wait_for_step(run_folder, 3, launcher, log_path)
        every = psutil.Process(launcher.pid).children(recursive=True)
        ranks = ranks_of(launcher)
        assert len(ranks) == 2
        stopped = next(p for p in ranks if p.environ()["RANK"] == "1")
        stopped.send_signal(signal.SIGSTOP)
        status = launcher.wait(timeout=NO_PROGRESS + LAUNCHER_GRACE)
        assert status != 0
        _, alive = psutil.wait_procs(every, timeout=10)
        assert not alive, "no process outlives the job"
    log = log_path.read_text()
    assert f"rank 0 made no progress for {NO_PROGRESS} s in step" in log
    stacks = (run_folder / "stacks" / "rank_00000.txt").read_text()
    assert "micro_step" in stacks or "in train" in stacks, stacks
    assert not (run_folder / "stacks" / "rank_00001.txt").exists(), "it stood still"


def test_a_rank_that_is_killed_is_one_line_of_its_peer(folder):
    run_folder, log_path = folder / "killed", folder / "killed.log"
    overrides = [f"run.output_dir={run_folder}", "run.total_steps=100000"]
    with started(folder, 1, *overrides, "data.num_workers=0", log=log_path) as launcher:
        wait_for_step(run_folder, 3, launcher, log_path)
        every = psutil.Process(launcher.pid).children(recursive=True)
        next(p for p in ranks_of(launcher) if p.environ()["RANK"] == "1").kill()
        assert launcher.wait(timeout=LAUNCHER_GRACE) != 0
        _, alive = psutil.wait_procs(every, timeout=10)
        assert not alive, "no process outlives the job"
    log = log_path.read_text()
    assert log.count(" ERROR rank 0: a peer is gone: ") == 1, log[-3000:]
    assert "Traceback" not in log


def test_an_image_that_is_cut_short_ends_the_job_in_a_line_with_rank_shard_and_key(folder):
    position = 22  # of the stream: with 2 x 2 images a step in the sixth one, of rank 1
    index = read_index(folder / "train")
    number = SampleOrder(
        index.samples_per_shard, seed=RunConfig.model_fields["seed"].default
    ).sample_at(position)
    key = index.sample(number.sample).key
    photographs = folder / "photographs"
    shutil.copytree(ROOT / "tests/data/photos/train", photographs / "train")
    (victim,) = photographs.glob(f"{key}.*")
    os.truncate(victim, victim.stat().st_size // 2)
    paths = find_images(photographs / "train")
    write_shards(paths, folder / "cut_short", samples_per_shard=10, root=photographs)

    sections = [f"run.output_dir={folder / 'run_cut_short'}", "run.calibration_images=4"]
    done = finish(folder, 1, *sections, f"data.train={folder / 'cut_short'}")
    assert done.returncode in (1, 2), "whichever rank the launcher finds first"
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and lines[0].startswith(f"error: rank 1: {folder / 'cut_short'}/")
    assert f"sample {key!r}: cannot decode the image: " in lines[0]
    assert "in decode_image" not in done.stderr
    assert read_metrics(folder / "run_cut_short")[-1]["step"] == 5


def test_a_discriminator_that_explodes_ends_the_run_with_the_last_good_weights(folder):
    run_folder = folder / "exploded"
    overrides = [
        f"run.output_dir={run_folder}",
        "lr_multiplier.discriminator=1e7",
        "guard.max_skipped_steps=3",
        "checkpoint.every_steps=8",
        "checkpoint.keep_last=1",
        "monitor.log_every_steps=6",
    ]
    done = finish(folder, 1, *overrides)
    assert done.returncode == 1, done.stderr[-4000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "3 steps in a row were skipped" in lines[0]
    assert "gan/discriminator = " in lines[0] or "loss/adversarial = " in lines[0]
    checkpoint = find_step_folder(run_folder)
    assert f"{checkpoint} holds the weights" in lines[0] and "remove that folder" in lines[0]
    before = run_folder / "checkpoints" / "step_00000008"
    assert find_step_folders(run_folder) == [checkpoint, before], "nothing healthy went for it"
    steps = [e for e in read_metrics(run_folder) if "loss/total" in e]
    assert [e["step"] % 6 == 0 for e in steps] == [True] * (len(steps) - 1) + [False]
    assert steps[-1]["optim/skipped_steps"] == 3, "the last window is logged, whenever it ends"
    assert read_manifest(checkpoint).step == steps[-1]["step"]
    consolidate(checkpoint, folder / "exploded_weights", to="inference")
    good = [e["loss/reconstruction"] for e in steps]
    assert good[-1] < 2 * min(good), "the generator is as good as before"
