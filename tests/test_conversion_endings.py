"""A conversion that does not get to its end: killed, interrupted, out of disk. Nothing stays."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.conftest import run_python, start_python
from tests.zero_files import write_step
from vqrae_ds.conversion.consolidate import consolidate, verify
from vqrae_ds.conversion.output_folder import new_folder
from vqrae_ds.conversion.record import RECORD_NAME

TOOL = "tools/convert_checkpoint.py"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 256 MB, which takes a good part of a second to write."""
    trained = {f"vqrae.layer{i}": torch.full((1 << 23,), float(i)) for i in range(8)}
    folder = tmp_path_factory.mktemp("large") / "step_00001000"
    return write_step(folder, trained, {}, {}, world_size=2)


def wait_for_partial(output: Path, process: subprocess.Popen[str]) -> Path:
    """The folder that the process writes into, as soon as a file is in it."""
    pattern = f".{output.name}.*.partial"
    left = set(output.parent.glob(pattern))  # the process removes them, so nobody looks inside
    while True:
        for folder in set(output.parent.glob(pattern)) - left:
            if any(folder.iterdir()):
                return folder
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)


def wait_for_record(output: Path, process: subprocess.Popen[str]) -> Path:
    """The folder of a conversion that is written, and to be verified."""
    partial = wait_for_partial(output, process)
    while not (partial / RECORD_NAME).exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    return partial


@pytest.mark.parametrize(
    ("number", "status", "wait", "options"),
    [
        (signal.SIGTERM, 143, wait_for_partial, []),
        (signal.SIGINT, 130, wait_for_record, ["--verify"]),
    ],
    ids=["term_while_writing", "int_while_verifying"],
)
def test_an_interrupted_conversion_cleans_up(large, tmp_path, number, status, wait, options):
    output = tmp_path / "out"
    process = start_python(TOOL, str(large), str(output), "--to", "inference", *options)
    wait(output, process)
    process.send_signal(number)
    _, error = process.communicate()
    assert process.returncode == status, error
    assert error.splitlines()[-1].startswith("error: ") and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_pass_its_verification_does_not_appear(large, tmp_path):
    """A byte that the disk gives back otherwise than it was written."""
    output = tmp_path / "out"
    process = start_python(TOOL, str(large), str(output), "--to", "inference", "--verify")
    path = wait_for_record(output, process) / "model.safetensors"
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    _, error = process.communicate()
    assert process.returncode == 2
    assert "layer7 in model.safetensors differs from the checkpoint" in error.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def kill_amid_the_writing(output: Path, process: subprocess.Popen[str], num_bytes: int) -> bool:
    """Kill -9 once so much is written; false where the conversion came to its end before.

    It runs for a millisecond at a time, so that even a fast disk is met in the middle.
    """
    partial = wait_for_partial(output, process)
    while process.poll() is None:
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        written = [path.stat().st_size for path in partial.glob("*")]
        if sum(written) >= num_bytes or output.exists():
            process.kill()
            break
        process.send_signal(signal.SIGCONT)
        time.sleep(0.001)
    process.communicate()
    return not output.exists()


def test_kill_9_at_any_moment_leaves_nothing_that_looks_complete(large, tmp_path, caplog):
    """A folder is there whole or not at all, and the next conversion removes what is left."""
    output, draw, killed = tmp_path / "out", random.Random(0), 0
    for _ in range(4):
        process = start_python(TOOL, str(large), str(output), "--to", "inference")
        if kill_amid_the_writing(output, process, draw.randrange(1 << 28)):
            assert len(list(tmp_path.glob(".out.*.partial"))) == 1, "earlier ones are gone"
            killed += 1
        else:
            verify(large, output)
            shutil.rmtree(output)
    assert killed, "no conversion was killed before its end"
    consolidate(large, output, to="inference")
    assert "left by an interrupted conversion, removed" in caplog.text
    verify(large, output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_conversion_still_writes_is_left_alone(large, tmp_path, caplog):
    output = tmp_path / "out"
    process = start_python(TOOL, str(large), str(output), "--to", "inference")
    partial = wait_for_partial(output, process)
    process.send_signal(signal.SIGSTOP)
    try:
        with new_folder(output) as ours:
            assert partial.is_dir() and "or still being written" in caplog.text
            (ours / "file").write_text("ours")
    finally:
        process.send_signal(signal.SIGCONT)
        _, error = process.communicate()
    # The other one took the name: this one fails, and says why.
    assert process.returncode == 1, error
    assert f"error: {output} could not be written, nothing of it is left" in error
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "file"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with a lot of space and room for 5 files and folders."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=64m,nr_inodes=6", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(["mount", *options], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no `mount` here")
    if mounted.returncode:
        pytest.skip(f"mounting a small disk is not allowed here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_cannot_hold_the_output_is_seen_before_writing(large, small_disk):
    done = run_python(TOOL, str(large), str(small_disk / "out"), "--to", "inference")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "needs 0.27 GB, and 0.07 GB are free in" in done.stderr
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_is_full_half_way_leaves_nothing(small_disk, tmp_path):
    """Space is there, so that writing begins; the 6th file is one too many."""
    trained = {f"vqrae.layer{i}": torch.ones(1 << 18) for i in range(12)}
    checkpoint = write_step(tmp_path / "step_00001000", trained, {}, {}, world_size=1)
    with pytest.raises(OSError, match="out could not be written, nothing of it is left.*No space"):
        consolidate(checkpoint, small_disk / "out", to="inference", max_shard_bytes=1 << 21)
    assert list(small_disk.iterdir()) == []
    consolidate(checkpoint, small_disk / "out", to="inference")
    verify(checkpoint, small_disk / "out")


def test_a_disk_that_is_full_half_way_is_exit_status_1(small_disk, tmp_path):
    """No room is left for `conversion.json`, the last of all."""
    checkpoint = write_step(tmp_path / "step_00001000", {"vqrae.a": torch.ones(3)}, {}, {})
    (small_disk / "a").write_text("")
    (small_disk / "b").write_text("")
    done = run_python(TOOL, str(checkpoint), str(small_disk / "out"), "--to", "inference")
    assert done.returncode == 1, done.stderr
    assert "nothing of it is left" in done.stderr and "Traceback" not in done.stderr
    assert sorted(path.name for path in small_disk.iterdir()) == ["a", "b"]
