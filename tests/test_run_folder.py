"""One start of a run at a time: a second one waits, is refused, or takes over."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from vqrae_ds import run_folder

HOLDER = """
import sys, time
from multiprocessing import get_context
from pathlib import Path
from vqrae_ds.run_folder import lock
held = lock(Path(sys.argv[1]))
# As the workers of a loader do, it outlives the rank that was killed.
worker = get_context("fork").Process(target=time.sleep, args=(20,))
worker.start()
print(worker.pid, flush=True)
time.sleep(float(sys.argv[2]))
"""


def start_holder(folder: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that trains in `folder` for so long."""
    command = [sys.executable, "-c", HOLDER, str(folder), str(seconds)]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline().strip().isdecimal()
    return holder


def test_a_second_start_is_refused_while_the_first_lives(tmp_path, caplog):
    holder = start_holder(tmp_path, 60)
    begin = time.monotonic()
    message = rf"{tmp_path} is in training by process {holder.pid} on .*touch {tmp_path}/STOP"
    with pytest.raises(ValueError, match=message):
        run_folder.lock(tmp_path, wait_seconds=1)
    assert time.monotonic() - begin > 1
    assert "this start waits 1 s for its end" in caplog.text
    holder.kill()
    holder.wait()
    caplog.clear()
    with run_folder.lock(tmp_path, wait_seconds=5):
        assert not caplog.records, "what was killed holds nothing, though its child lives"


def test_a_requeued_job_takes_the_place_of_its_earlier_start_alone(tmp_path, monkeypatch, caplog):
    """As where a file server keeps the lock of a machine that is gone."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    holder = start_holder(tmp_path, 60)
    for job, restarts in (("17", "0"), ("18", "1")):  # the same start, another job
        monkeypatch.setenv("SLURM_JOB_ID", job)
        monkeypatch.setenv("SLURM_RESTART_COUNT", restarts)
        with pytest.raises(ValueError, match=f"start 0 of job 17.*remove {tmp_path}/lock"):
            run_folder.lock(tmp_path, wait_seconds=0.1)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    with run_folder.lock(tmp_path, wait_seconds=0.1):
        assert "taking the place of this earlier start" in caplog.text
        third = [sys.executable, "-c", HOLDER, str(tmp_path), "0"]
        with pytest.raises(subprocess.TimeoutExpired):  # it waits: the new lock holds
            subprocess.run(third, cwd=ROOT, timeout=10, capture_output=True)
    holder.kill()
    holder.wait()


def test_a_second_start_takes_over_from_a_first_one_that_ends(tmp_path):
    holder = start_holder(tmp_path, 1.5)
    with run_folder.lock(tmp_path, wait_seconds=60):
        assert holder.poll() is not None or holder.wait(timeout=5) is not None
    text = (tmp_path / run_folder.LOCK_NAME).read_text()
    assert text.startswith("process ") and str(holder.pid) not in text.split()
