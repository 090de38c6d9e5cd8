"""What a batch job asks of SLURM, with a scontrol that says what SLURM's own (22.05) says."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from vqrae_ds.launching import slurm, slurm_job
from vqrae_ds.launching.owner import this_process
from vqrae_ds.launching.run_folder import RunFolder
from vqrae_ds.launching.slurm_job import JobState, Refused, requeue, state_of

# Of a controller that is killed.
AWAY = (
    "1 slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
    "1 Unexpected message received for job 7",
)
RUNNING = "0 JobId=7 JobState=RUNNING Reason=None StartTime=2030-01-02T00:00:00 PreemptTime=None"


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder: `answers` are given in turn, the last one for ever; `asked` has the questions."""
    tool = tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(
        f"""#!/bin/bash
cd {tmp_path}
echo "$*" >> asked
read -r status text < answers
(($(wc -l < answers) == 1)) || sed -i 1d answers
((status)) && echo "$text" >&2 || echo "$text"
exit $status
"""
    )
    tool.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setattr(slurm_job, "PAUSE_SECONDS", 0.01)
    return tmp_path


def answer(folder: Path, *answers: str) -> None:
    (folder / "answers").write_text("".join(f"{line}\n" for line in answers))
    (folder / "asked").write_text("")


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text().splitlines()


def test_a_controller_that_is_away_is_asked_again(scontrol, monkeypatch):
    answer(scontrol, *AWAY, "0")
    requeue(7)
    assert asked(scontrol) == ["requeue 7"] * 3
    answer(scontrol, AWAY[0], RUNNING)
    assert state_of(7) == JobState("RUNNING")
    monkeypatch.setattr(slurm_job, "PATIENCE_SECONDS", 0.2)
    answer(scontrol, *AWAY)
    with pytest.raises(Refused, match="Unexpected message"):
        requeue(7)
    assert len(asked(scontrol)) > 2


@pytest.mark.parametrize(
    "reason",
    [
        "Requested operation is presently disabled for job 7",
        "Job is pending execution for job 7",
        "slurm_load_jobs error: Invalid job id specified",
    ],
)
def test_a_refusal_of_slurm_counts_at_once(scontrol, reason):
    answer(scontrol, f"1 {reason}")
    with pytest.raises(Refused, match=reason):
        requeue(7, hold=True)
    assert asked(scontrol) == ["requeuehold 7"]


def test_who_is_preempted_is_so_in_this_start(scontrol):
    for time, is_preempted in (("02T00:00:09", True), ("01T23:59:59", False)):
        answer(scontrol, RUNNING.replace("PreemptTime=None", f"PreemptTime=2030-01-{time}"))
        assert state_of(7) == JobState("RUNNING", is_preempted)


def test_another_job_s_run_is_taken_over_when_slurm_calls_it_ended(scontrol):
    own = this_process(8)._replace(cluster="c")
    run = scontrol / "run"
    RunFolder(run).open(own._replace(job=7))
    for said in (RUNNING, RUNNING.replace("RUNNING", "COMPLETING")):
        answer(scontrol, said)
        with pytest.raises(ValueError, match="job 7 is at work on this run"):
            RunFolder(run).open(own)
    answer(scontrol, "1 slurm_load_jobs error: Access/permission denied")
    with pytest.raises(ValueError, match="job 7 has launched this run and cannot be asked"):
        RunFolder(run).open(own)
    answer(scontrol, "1 slurm_load_jobs error: Invalid job id specified")
    RunFolder(run).open(own)
    RunFolder(run).open(own._replace(pid=1, host="other"))  # the same job, started again
    assert len(asked(scontrol)) == 1
    answer(scontrol, "0 JobId=8 JobState=NODE_FAIL")
    RunFolder(run).open(own._replace(job=9))


def test_a_job_that_was_requeued_looks_at_its_nodes_again(tmp_path, monkeypatch):
    looks = []

    def look(hosts, way, needs) -> bool:
        looks.append(way)
        return len(looks) == 3

    monkeypatch.setattr(slurm, "look_before_launch", look)
    monkeypatch.setattr(slurm, "PAUSE_SECONDS", 0)
    folder = RunFolder(tmp_path)
    assert not slurm._find_sound([], None, folder, patience=0) and looks == ["srun"]
    assert slurm._find_sound([], None, folder, patience=60) and len(looks) == 3
    folder.times_asked = 1
    assert not slurm._find_sound([], None, folder, patience=60) and len(looks) == 3


@pytest.mark.parametrize(
    ("start", "has_ended", "question"), [(0, True, "show"), (1, False, "requeuehold")]
)
def test_nodes_that_stay_broken(scontrol, start, has_ended, question):
    """A new job fails; one that was requeued is held, and waits for SLURM to end it."""
    code = f"""
import logging, sys
from pathlib import Path
from vqrae_ds.launching.run_folder import RunFolder
from vqrae_ds.launching.slurm import _end_before_launch
logging.basicConfig(level=logging.INFO)
sys.exit(_end_before_launch(RunFolder(Path("run")), 7, {start}))
"""
    answer(scontrol, RUNNING)
    command = [sys.executable, "-c", code]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as job:
        if has_ended:
            assert job.wait(60) == 1
        else:
            assert "requeued and held: scontrol release 7" in job.stderr.readline()
            job.terminate()
            assert job.wait(10) == -signal.SIGTERM
    assert asked(scontrol)[-1].startswith(question)
