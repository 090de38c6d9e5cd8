"""Jobs of SLURM: to their end, interrupted in every way that SLURM knows, and hurt.

A rank is stopped (SIGSTOP) while SLURM takes its time to interrupt the job; so a short run is long
enough.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cluster import runs
from tests.cluster.cluster import CONTROLLER, ENDED, MiniCluster, wait_until
from tests.launching import train
from vqrae_ds.stopping import DONE, PREEMPTED, STOP

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CLUSTER = {"MC_TIMEOUT": "15", "MC_GRACE": "60", "MC_KILL_WAIT": "60"}
# A rank dies, and its launcher notices within 1 s; srun ends the others after KillWait at the most.
END_SECONDS = 90
# A node is called down after SlurmdTimeout, once in that time; then KillWait and the credential.
NODE_LOSS_SECONDS = 180


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("slurm")
    runs.make_files(folder)
    return folder


@pytest.fixture(scope="module")
def straight(folder):
    """The weights of the same run on one node, by DeepSpeed's launcher alone."""
    train(folder, 1, *runs.SETTINGS, f"run.output_dir={folder / 'straight'}")
    return runs.weights_of(folder / "straight", folder / "straight_weights")


def is_there(cluster: MiniCluster, job: str) -> bool:
    """Whether the job has not ended; to wait in the queue is no end."""
    return cluster.job(job)["JobState"] not in ENDED


def finish(cluster: MiniCluster, job: str, folder: Path, run: Path, straight) -> dict[str, str]:
    """Wait for the job's end; it must be done, with the weights of the straight run."""
    ended = cluster.wait_for_job(job, seconds=runs.START_SECONDS + 120)
    assert ended["JobState"] == "COMPLETED", runs.log_of(folder, run)
    assert (run / DONE).exists() and not (run / PREEMPTED).exists()
    weights = runs.weights_of(run, folder / f"{run.name}_weights")
    runs.assert_same(weights, straight)
    assert not runs.left_on(cluster)
    return ended


def test_arguments_and_environment_arrive_and_the_weights_are_those_of_one_node(
    cluster, folder, straight
):
    run = folder / f"run {runs.ODD}"
    (folder / "env").write_text("export VQRAE_OF_THE_SITE=given\n")
    env = {"VQRAE_ODD": runs.ODD, "ENV_FILE": str(folder / "env")}
    job = runs.submit(cluster, folder, run, f"--output={folder}/odd.log", env=env)
    runs.wait_for_step(run, 1, lambda: is_there(cluster, job))
    for node in cluster.nodes:
        theirs = runs.environment_of(cluster, node, runs.rank_of(cluster, node))
        assert theirs["VQRAE_ODD"] == runs.ODD and theirs["VQRAE_OF_THE_SITE"] == "given"
    assert finish(cluster, job, folder, run, straight)["Restarts"] == "0"


def test_a_job_comes_back_from_every_interruption(cluster, folder, straight):
    run = folder / "interrupted"
    job = runs.submit(cluster, folder, run, "--signal=B:USR1@60")

    def interrupt(step: int, *command: str) -> None:
        """Once the run is at the step; returns when the job is in the queue again."""
        runs.wait_for_step(run, step, lambda: is_there(cluster, job))
        rank, restarts = runs.rank_of(cluster, "n2"), cluster.job(job)["Restarts"]
        runs.send(cluster, "n2", "STOP", rank)
        cluster.ask(CONTROLLER, *command)
        wait_until("the wish to stop", 120, lambda: (run / STOP).exists())
        runs.send(cluster, "n2", "CONT", rank)
        wait_until("a requeue", 120, lambda: cluster.job(job)["Restarts"] != restarts)
        assert not (run / DONE).exists()

    interrupt(3, "scancel", "--batch", "--signal=USR1", job)
    # Three minutes from its start, of which --signal leaves two.
    cluster.wait_for_job(job, "RUNNING", seconds=60)
    runs.wait_for_step(run, 8, lambda: is_there(cluster, job))
    interrupt(9, "scontrol", "update", f"JobId={job}", "TimeLimit=1")
    cluster.ask(CONTROLLER, "scontrol", "update", f"JobId={job}", "TimeLimit=20")
    finish(cluster, job, folder, run, straight)
