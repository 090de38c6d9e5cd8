"""Both stages as jobs that wait for one another."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cluster import runs
from tests.cluster.cluster import BUSY_SECONDS, CONTROLLER, ENDED, MiniCluster, wait_until
from vqrae_ds import VQRAE
from vqrae_ds.stopping import DONE, STOP

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def submit_chain(
    cluster: MiniCluster, folder: Path, out: Path, stage1: Path, **env: str
) -> subprocess.CompletedProcess[str]:
    """The script, which prints the numbers of the four jobs."""
    files = [stage1, folder / "deepspeed.json", *runs.files_of(folder, 2)]

    options = f"--time=20 --output='{folder}/{out.name}-%j.log'"
    jobs = {"TRAIN_OPTIONS": f"--gres=none {options}", "CONVERT_OPTIONS": f"--mem=2000 {options}"}
    env = runs.site(**jobs) | env
    command = ["bash", "launchers/slurm_chain.sh", out, *files, *runs.SETTINGS]
    return cluster.run(CONTROLLER, *command, env=env)


def test_stages_wait_for_one_another_over_a_requeue(cluster, folder, straight):
    out = folder / "chain 'n' #2"
    jobs = submit_chain(cluster, folder, out, folder / "stage1.yaml").stdout.split()
    first = jobs[0]
    runs.wait_for_step(out / "stage1", 5, lambda: cluster.job(first)["JobState"] not in ENDED)
    (out / "stage1" / STOP).touch()
    wait_until("a requeue", BUSY_SECONDS, lambda: cluster.job(first)["Restarts"] == "1")
    assert [cluster.job(job)["Reason"] for job in jobs[1:]] == ["Dependency"] * 3
    for job in jobs:
        ended = cluster.wait_for_job(job, seconds=2 * runs.START_SECONDS)
        assert ended["JobState"] == "COMPLETED", ended
    assert (out / "stage1" / DONE).exists() and (out / "stage2" / DONE).exists()
    runs.assert_same(load_file(out / "stage1_weights" / "model.safetensors"), straight)
    VQRAE.from_pretrained(out / "inference")


def test_what_follows_a_stage_that_fails_is_cancelled(cluster, folder):
    jobs = submit_chain(
        cluster, folder, folder / "broken", folder / "not_there.yaml"
    ).stdout.split()
    states = [cluster.wait_for_job(job, seconds=BUSY_SECONDS)["JobState"] for job in jobs]
    assert states == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"]
    assert not (folder / "broken").exists()


def test_a_chain_that_cannot_be_submitted_whole_leaves_nothing_in_the_queue(cluster, folder):
    out, options = folder / "refused", "--partition=nowhere"
    done = submit_chain(cluster, folder, out, folder / "stage1.yaml", CONVERT_OPTIONS=options)
    assert done.returncode == 1 and "invalid partition" in done.stderr
    (job,) = done.stdout.split()
    assert done.stderr.splitlines()[-1] == f"error: the chain is not complete; cancelled: {job}"
    assert cluster.wait_for_job(job, seconds=BUSY_SECONDS)["JobState"] == "CANCELLED"
