"""Runs by the real launcher: killed while they save, or without room to save at all."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disks import Level, leave, mounted
from tests.launching import finish, make_inputs, started, train, write_configs
from vqrae_ds import manifest

pytestmark = pytest.mark.slow

DEADLINE_SECONDS = 180


@pytest.fixture(scope="module")
def folder(tmp_path_factory, lpips_weights) -> Path:
    folder = tmp_path_factory.mktemp("saving_ends")
    make_inputs(folder)
    write_configs(folder, lpips_weights)
    return folder


def kill_amid_a_save(folder: Path, run_folder: Path, overrides: list[str]) -> Path:
    """Kill -9 launcher and ranks while a checkpoint is half-written. Returns its folder."""
    log = run_folder.with_suffix(".log")
    with started(folder, 1, *overrides, log=log) as launcher:
        deadline = time.monotonic() + DEADLINE_SECONDS
        for partial in partial_ones(run_folder / "checkpoints"):
            assert launcher.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline, "no save was met"
            if partial is None:
                continue
            os.killpg(launcher.pid, signal.SIGSTOP)
            time.sleep(0.05)  # a signal is on its way until then
            if is_partial(partial) and any(path.is_file() for path in partial.rglob("*")):
                return partial
            os.killpg(launcher.pid, signal.SIGCONT)
    raise AssertionError("unreachable")


def partial_ones(checkpoints: Path) -> Iterator[Path | None]:
    """The newest folder again and again, while it is partial and not the first; else None."""
    while True:
        newest = next(iter(manifest.step_folders(checkpoints).items()), None)
        met = newest is not None and newest[0] > 2 and is_partial(newest[1])
        yield newest[1] if met else None


def is_partial(folder: Path) -> bool:
    return folder.is_dir() and not (folder / manifest.MANIFEST_NAME).exists()


@pytest.mark.parametrize("way", ["direct", "local"])
def test_killed_amid_a_save_a_run_goes_on_from_the_checkpoint_before(folder, way):
    run_folder, nodes = folder / way, folder / f"{way}_nodes"
    overrides = [f"run.output_dir={run_folder}", "run.total_steps=12"]
    overrides += ["losses.adversarial=null", "checkpoint.every_steps=1"]
    overrides.append("checkpoint.keep_last=100")
    if way == "local":
        overrides.append(f"checkpoint.local_dir={nodes}")
    partial = kill_amid_a_save(folder, run_folder, overrides)
    before = manifest.find_step_folder(run_folder)
    assert before.name < partial.name
    assert manifest.find_damage(before, manifest.read_manifest(before)) == []
    log = train(folder, 1, *overrides)
    assert f"resumed from {before}" in log
    complete = manifest.complete_steps(run_folder / "checkpoints")
    assert sorted(manifest.step_folders(run_folder / "checkpoints").values()) == complete[::-1]
    assert len(complete) == 12
    for checkpoint in complete:
        assert manifest.find_damage(checkpoint, manifest.read_manifest(checkpoint)) == []
    assert not [path for path in nodes.rglob("*") if path.is_file()]


def test_a_run_without_room_for_a_checkpoint_warns_goes_on_and_ends_with_status_1(folder):
    with mounted(folder / "small") as disk:
        leave(disk, Level(num_bytes=1_200_000))
        overrides = [f"run.output_dir={disk / 'run'}", "run.total_steps=6"]
        overrides += ["checkpoint.every_steps=2", "losses.adversarial=null"]
        done = finish(folder, 1, *overrides)
        assert done.returncode == 1, done.stderr[-4000:]
        assert "the checkpoints of this run may not fit: rank 0: " in done.stderr
        assert "THE CHECKPOINT AFTER STEP 2 WAS NOT SAVED: rank 0: " in done.stderr
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and lines[0].startswith("error: the weights after step 6, the last")
        assert "MB are needed and" in lines[0] and "so nothing was written" in lines[0]
        assert not list((disk / "run" / "checkpoints").glob("*"))

        shutil.rmtree(disk / "run" / "frozen")
        leave(disk, Level(num_bytes=0))
        done = finish(folder, 1, *overrides)
        assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr[-4000:]
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "No space left on device" in lines[0]


def test_a_local_folder_that_cannot_be_had_is_a_mistake(folder):
    (folder / "file").write_text("no folder")
    overrides = [f"run.output_dir={folder / 'mistaken'}", f"checkpoint.local_dir={folder / 'file'}"]
    done = finish(folder, 1, *overrides)
    assert done.returncode == 2, done.stderr[-4000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "checkpoint.local_dir: " in lines[0], "one rank says it for all"
