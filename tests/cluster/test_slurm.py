"""Jobs of SLURM: to their end, interrupted in every way that SLURM knows, and hurt.

A rank is stopped (SIGSTOP) while SLURM takes its time to interrupt the job; so a short run is long
enough.
"""

from __future__ import annotations

import signal
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.cluster import faults, runs
from tests.cluster.cluster import BUSY_SECONDS, CONTROLLER, ENDED, MiniCluster, wait_until
from vqrae_ds.stopping import DONE, PREEMPTED, STOP

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

CLUSTER = {"MC_TIMEOUT": "10", "MC_GRACE": "60", "MC_KILL_WAIT": "25"}
PREEMPTING = ["sbatch", "-p", "high", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1"]
# A rank dies, and its launcher notices within 1 s; srun ends the others after KillWait at the most.
END_SECONDS = 90
# A node is called down after SlurmdTimeout, once in that time; then KillWait and the credential.
NODE_LOSS_SECONDS = 180


def is_there(cluster: MiniCluster, job: str) -> bool:
    """Whether the job has not ended; to wait in the queue is no end."""
    return cluster.job(job)["JobState"] not in ENDED


def is_free(cluster: MiniCluster) -> bool:
    """Whether no job has a node, not even one that is ending."""
    return not cluster.ask(CONTROLLER, "squeue", "-h", "--states=RUNNING,COMPLETING")


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
    """With the Python of the nodes in a container, and none with torch outside of it."""
    run = folder / f"slurm {runs.ODD}"
    # What an interactive shell bears.
    (folder / "env").write_text('export VQRAE_OF_THE_SITE="given$NOT_SET"\n[ -d /no ] && X=1\n')
    within = folder / "within"  # what would put a node's Python into a container
    within.write_text(f'#!/bin/sh\nexport VQRAE_WITHIN=yes\nexec {sys.executable} "$@"\n')
    within.chmod(0o700)
    outside = runs.python_without_torch(folder / "outside")
    env = {"VQRAE_ODD": runs.ODD, "ENV_FILE": str(folder / "env"), "NODE_PYTHON": str(within)}
    env |= {"PYTHON": str(outside), "HF_TOKEN": "first-secret", "MLFLOW_PASSWORD": "second-secret"}
    # Many sites want tasks to be named; there is one launcher a node all the same.
    options = (f"--output={folder}/odd.log", "--ntasks-per-node=2")
    job = runs.submit(cluster, folder, run, *options, env=env)
    for node in cluster.nodes:
        theirs = runs.environment_of(cluster, node, runs.rank_of(cluster, node))
        assert theirs["VQRAE_ODD"] == runs.ODD and theirs["VQRAE_OF_THE_SITE"] == "given"
        assert theirs["VQRAE_WITHIN"] == "yes"
    command = ["bash", "launchers/multinode.sh", folder / "hosts", *runs.files_of(folder, 1)]
    second = cluster.run(CONTROLLER, *command, *runs.settings_of(run), env=runs.site())
    assert second.returncode == 2 and f"job {job} is at work on this run" in second.stderr
    assert finish(cluster, job, folder, run, straight)["Restarts"] == "0"
    log = (folder / "odd.log").read_text()
    assert "2 nodes in" in log and "sound" in log, "the doctor has looked"
    assert "-secret" not in log


def has_heard(cluster: MiniCluster, run: Path, rank: int) -> bool:
    """Whether the wish to stop is there: as the file, or as a signal that the rank has or had."""
    status = cluster.run("n2", "cat", f"/proc/{rank}/status")
    if (run / STOP).exists() or status.returncode:  # with its TERM SLURM sends a CONT
        return True
    waiting = int(status.stdout.partition("ShdPnd:")[2].split()[0], base=16)
    return bool(waiting >> (signal.SIGTERM - 1) & 1)


def two_minutes(cluster: MiniCluster, job: str) -> int:
    """A time limit at which the job has one to two minutes left: less than its --signal leaves."""
    hours, minutes, seconds = map(int, cluster.job(job)["RunTime"].split(":"))
    return 60 * hours + minutes + (seconds > 0) + 1


def preempt_in_the_doctor_s_hands(cluster: MiniCluster, folder: Path, run: Path, job: str) -> None:
    """Another job takes the nodes while the doctor waits for a file server that hangs."""
    wait_until("the launcher", BUSY_SECONDS, (run / "launch" / "owner.json").exists)
    cluster.ask(CONTROLLER, *PREEMPTING)
    wait_until("a requeue", BUSY_SECONDS, lambda: cluster.job(job)["Restarts"] == "1")
    assert "BROKEN: do not start yet" in (folder / f"{run.name}.log").read_text()
    assert not (run / "metrics.jsonl").exists()


def test_a_job_comes_back_from_every_interruption(cluster, folder, straight):
    run = folder / "interrupted"
    with faults.hanging(cluster, "n2", folder / "train"):
        job = runs.submit(cluster, folder, run, "--signal=B:USR1@120")
        preempt_in_the_doctor_s_hands(cluster, folder, run, job)
    interruptions = [
        lambda: ["scancel", "--batch", "--signal=USR1", job],
        lambda: ["scontrol", "update", f"JobId={job}", f"TimeLimit={two_minutes(cluster, job)}"],
        lambda: PREEMPTING,
        lambda: ["scontrol", "requeue", job],
    ]
    for number, interruption in enumerate(interruptions):
        rank, restarts = runs.rank_of(cluster, "n2"), cluster.job(job)["Restarts"]
        runs.wait_for_step(run, 4 + 10 * number, lambda: is_there(cluster, job))
        runs.send(cluster, "n2", "STOP", rank)
        cluster.ask(CONTROLLER, *(command := interruption()))
        wait_until(
            f"{command} to be heard of", BUSY_SECONDS, partial(has_heard, cluster, run, rank)
        )
        cluster.run("n2", "kill", "-CONT", str(rank))
        wait_until("a requeue", BUSY_SECONDS, lambda r=restarts: cluster.job(job)["Restarts"] != r)
        assert not (run / DONE).exists()
        if "update" in command:
            cluster.ask(CONTROLLER, "scontrol", "update", f"JobId={job}", "TimeLimit=20")
    assert finish(cluster, job, folder, run, straight)["Restarts"] == "5"
    log = (folder / "interrupted.log").read_text()
    assert log.count("asked to stop after step") == 4, "each time with a checkpoint"


def test_a_job_that_is_asked_to_stop_before_it_has_begun_does_not_come_back(cluster, folder):
    """As where --signal leaves as much time as --time gives: it would come back for ever."""
    run = folder / "asked"
    job = runs.submit(cluster, folder, run)
    wait_until("the launcher", BUSY_SECONDS, (run / "launch" / "owner.json").exists)
    cluster.ask(CONTROLLER, "scancel", "--batch", "--signal=USR1", job)
    ended = cluster.wait_for_job(job, seconds=runs.START_SECONDS)
    assert ended["JobState"] == "FAILED" and ended["Restarts"] == "0"
    assert "not requeued: no step was saved in this start" in (folder / "asked.log").read_text()


def test_a_job_that_is_cancelled_or_whose_rank_is_killed_goes_on_when_it_is_submitted_again(
    cluster, folder, straight
):
    run = folder / "again"
    job = runs.submit(cluster, folder, run)
    runs.wait_for_step(run, 5, lambda: is_there(cluster, job))
    cluster.ask(CONTROLLER, "scancel", job)
    wait_until("every process to end", END_SECONDS, lambda: not runs.left_on(cluster))
    wait_until("nodes that are free", BUSY_SECONDS, lambda: is_free(cluster))
    ended = cluster.job(job)
    assert ended["JobState"] == "CANCELLED" and ended["Restarts"] == "0"
    assert (run / PREEMPTED).exists(), "it has saved"

    job = runs.submit(cluster, folder, run)
    rank = runs.rank_of(cluster, "n2")
    runs.wait_for_step(run, 25, lambda: is_there(cluster, job))
    runs.send(cluster, "n2", "KILL", rank)
    ended = cluster.wait_for_job(job, seconds=END_SECONDS)
    assert ended["JobState"] == "FAILED" and ended["Restarts"] == "0"
    assert not (run / DONE).exists() and not (run / PREEMPTED).exists()
    wait_until("every process to end", 10, lambda: not runs.left_on(cluster))

    job = runs.submit(cluster, folder, run)
    finish(cluster, job, folder, run, straight)


def test_a_job_that_loses_a_node_comes_back_when_there_is_one(cluster, folder, straight):
    """On the first node are the batch script, srun, rank 0 and what all others have met at."""
    run = folder / "lost"
    job = runs.submit(cluster, folder, run)
    losses = [
        ("n1", cluster.node_down, cluster.node_up),
        ("n2", cluster.cut_off, cluster.reconnect),
    ]
    for number, (node, lose, bring_back) in enumerate(losses):
        runs.wait_for_step(run, 25 + 20 * number, lambda: is_there(cluster, job))
        lose(node)
        try:
            wait_until(
                f"a requeue without {node}",
                NODE_LOSS_SECONDS,
                lambda n=number: cluster.job(job)["Restarts"] == str(n + 1),
                pause=1,
            )
        finally:
            bring_back(node)
    finish(cluster, job, folder, run, straight)
