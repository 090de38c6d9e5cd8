"""How a training ends whose data fail it: a reader dies, or too many samples are bad."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.distributed import run_ranks
from tests.integration.test_tensor_parallel_checkpoints import FIELDS
from tests.launching import finish, make_inputs, ranks_of, started, wait_for_step, write_configs
from tests.tiny import make_run, save_initial
from vqrae_ds.data.failure import DataFailed
from vqrae_ds.data.index import read_index
from vqrae_ds.data.shard_writing import find_images, write_shards
from vqrae_ds.evaluation.summary import read_metrics
from vqrae_ds.manifest import find_step_folder, read_manifest
from vqrae_ds.stopping import DONE

pytestmark = pytest.mark.slow

TENSOR_PARALLEL = {
    "train_batch_size": 2,
    "train_micro_batch_size_per_gpu": 2,
    "tensor_parallel": {"autotp_size": 2},
}

MOST_SECONDS = 60  # until the launcher has ended


def test_the_death_of_a_worker_is_noticed_and_named(tmp_path, lpips_weights):
    make_inputs(tmp_path)
    write_configs(tmp_path, lpips_weights)
    log = tmp_path / "log"
    run = tmp_path / "run"
    overrides = [f"run.output_dir={run}", "run.total_steps=100000", "data.num_workers=2"]
    with started(tmp_path, 1, *overrides, log=log) as launcher:
        wait_for_step(run, 3, launcher, log)
        every = psutil.Process(launcher.pid).children(recursive=True)
        rank = next(p for p in ranks_of(launcher) if p.environ()["RANK"] == "1")
        readers = [p for p in rank.children() if p.cmdline() == rank.cmdline()]
        assert len(readers) == 2
        readers[0].kill()
        began = time.monotonic()
        assert launcher.wait(timeout=MOST_SECONDS) != 0
        _, alive = psutil.wait_procs(every, timeout=10)
        assert not alive, "no process outlives the job"
    said = [line for line in log.read_text().splitlines() if line.startswith("error: ")]
    assert len(said) == 1, log.read_text()[-3000:]
    assert said[0].startswith("error: rank 1: a process that reads data has died: ")
    assert f"pid {readers[0].pid}" in said[0].replace("(pid(s)", "(pid").replace("(", "")
    assert "Killed" in said[0] and "data.num_workers" in said[0]
    assert time.monotonic() - began < MOST_SECONDS


def stray(rank: int, folder: Path) -> None:
    """Rank 1 sees a set of which most images are damaged, and goes on with others."""
    from vqrae_ds.preparation import prepare
    from vqrae_ds.train import train

    scratch = folder / f"rank{rank}"
    for shards, log_every, save_every in (("own", 2, 9), ("own", 9, 2), ("shared", 2, 9)):
        output = folder / f"{shards}_{log_every}"
        run = make_run(
            scratch,
            1,
            losses={"perceptual": None, "adversarial": None},
            deepspeed=TENSOR_PARALLEL,
            model=FIELDS,
            run={"output_dir": str(output), "total_steps": 4},
            data={
                "train": str((scratch if shards == "own" else folder) / "shards"),
                "bad_samples": "skip",
                "max_bad_share": 1.0,
            },
            checkpoint={"every_steps": save_every},
            monitor={"log_every_steps": log_every, "validate_every_steps": 1000},
        )
        setup = prepare(run)
        if shards == "own":
            with pytest.raises(DataFailed, match="rank 1: it has read other images than rank 0 of"):
                train(run, setup)
            assert not list(output.rglob("manifest.json")), "no checkpoint has these weights"
        else:
            digest = setup.extra()["data_digest"]
            assert digest == read_index(folder / "shards").digest() and len(digest) == 32
            train(run, setup)
            assert read_metrics(output)[-1]["step"] == 4
    os._exit(0)  # the trainer has ended the process group


def test_ranks_of_a_tensor_group_do_not_train_on_different_images(tmp_path):
    photos = find_images(ROOT / "tests/data/photos")[:12]
    for place, last_sound in ((tmp_path, 12), (tmp_path / "rank0", 12), (tmp_path / "rank1", 3)):
        source = place / "photographs"
        source.mkdir(parents=True)
        for number, photo in enumerate(photos):
            data = photo.read_bytes()
            end = len(data) if number < last_sound else 3000
            (source / photo.name).write_bytes(data[:end])
        write_shards(find_images(source), place / "shards", samples_per_shard=5, root=source)
        if place != tmp_path:
            save_initial(place / "initial", FIELDS)
    run_ranks(2, stray, tmp_path)


def test_too_many_bad_samples_end_all_ranks_with_a_checkpoint(tmp_path, lpips_weights):
    make_inputs(tmp_path)
    write_configs(tmp_path, lpips_weights)
    source = tmp_path / "photographs"
    shutil.copytree(ROOT / "tests/data/photos/train", source)
    for photo in find_images(source)[::2]:
        os.truncate(photo, photo.stat().st_size // 2)
    write_shards(find_images(source), tmp_path / "half", samples_per_shard=10, root=source)
    run = tmp_path / "run"
    done = finish(
        tmp_path,
        1,
        f"run.output_dir={run}",
        "run.calibration_images=4",
        "run.total_steps=100000",
        f"data.train={tmp_path / 'half'}",
        "data.bad_samples=skip",
    )
    assert done.returncode == 1, done.stderr[-3000:]
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, "rank 0 says it for all"
    last = read_metrics(run)[-1]
    # One per cent of the 1000 samples that are the least to judge by.
    assert last["data/skipped"] == last["data/corrupt"] > 10
    assert last["step"] < 40
    assert f"{last['data/corrupt']:.0f} of the last {4 * last['step']} samples" in errors[0]
    assert "above data.max_bad_share = 0.01" in errors[0]
    checkpoint = find_step_folder(run)
    assert f"{checkpoint} is saved" in errors[0] and read_manifest(checkpoint).step == last["step"]
    assert not (run / DONE).exists()
    first = [line for line in done.stderr.splitlines() if "first of its kind (corrupt)" in line]
    assert first and all(".tar, sample " in line for line in first)
