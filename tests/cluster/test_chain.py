"""Both stages as jobs that wait for one another."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.cluster import runs
from tests.cluster.cluster import CONTROLLER, ENDED, MiniCluster, wait_until
from vqrae_ds import VQRAE
from vqrae_ds.stopping import DONE, STOP

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def submit_chain(cluster: MiniCluster, folder: Path, out: Path, stage1: Path) -> list[str]:
    """The numbers of the four jobs."""
    files = [stage1, folder / "deepspeed.json", *runs.files_of(folder, 2)]

    options = f"--time=20 --output={folder}/{out.name}-%j.log"
    env = runs.site(TRAIN_OPTIONS=f"--gres=none {options}", CONVERT_OPTIONS=f"--mem=2000 {options}")
    command = ["bash", "launchers/slurm_chain.sh", out, *files, *runs.SETTINGS]
    done = cluster.run(CONTROLLER, *command, env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_stages_wait_for_one_another_over_a_requeue(cluster, folder, straight):
    out = folder / "chain"
    jobs = submit_chain(cluster, folder, out, folder / "stage1.yaml")
    first = jobs[0]
    runs.wait_for_step(out / "stage1", 5, lambda: cluster.job(first)["JobState"] not in ENDED)
    (out / "stage1" / STOP).touch()
    wait_until("a requeue", 120, lambda: cluster.job(first)["Restarts"] == "1")
    assert [cluster.job(job)["Reason"] for job in jobs[1:]] == ["Dependency"] * 3
    for job in jobs:
        ended = cluster.wait_for_job(job, seconds=2 * runs.START_SECONDS)
        assert ended["JobState"] == "COMPLETED", ended
    assert (out / "stage1" / DONE).exists() and (out / "stage2" / DONE).exists()
    runs.assert_same(load_file(out / "stage1_weights" / "model.safetensors"), straight)
    VQRAE.from_pretrained(out / "inference")


def test_what_follows_a_stage_that_fails_is_cancelled(cluster, folder):
    jobs = submit_chain(cluster, folder, folder / "broken", folder / "not_there.yaml")
    states = [cluster.wait_for_job(job, seconds=60)["JobState"] for job in jobs]
    assert states == ["FAILED", "CANCELLED", "CANCELLED", "CANCELLED"]
    assert not (folder / "broken").exists()
