"""Runs by hostfile over pdsh: to their end, asked to stop, and hurt."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster import runs
from tests.cluster.cluster import CONTROLLER, MiniCluster
from tests.launching import train
from vqrae_ds.stopping import DONE, PREEMPTED, PREEMPTED_STATUS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

# SLURM, which has no part in this, is to call no node down. A greeting may lack the line's end.
CLUSTER = {"MC_TIMEOUT": "600", "MC_GREETING": "5 users are\non this machine "}
SILENCE, GRACE = 10, 10  # seconds; SILENCE and GRACE of launchers/multinode.sh
END_SECONDS = SILENCE + GRACE + 60  # the ranks of a node end within 30 s each; and a busy machine


def launch(
    cluster: MiniCluster,
    folder: Path,
    run: Path,
    *overrides: str,
    host: str = CONTROLLER,
    hostfile: str = "hosts",
    **env: str,
) -> subprocess.Popen:
    """The script on `host`; its log is beside the run's folder."""
    command = ["bash", "launchers/multinode.sh", folder / hostfile, *runs.files_of(folder, 1)]
    command += [*runs.settings_of(run), *overrides]
    env = runs.site(SILENCE=str(SILENCE), GRACE=str(GRACE), **env)
    with open(folder / "log", "a") as log:
        return cluster.start(
            host, command, env=env, stdout=log, stderr=subprocess.STDOUT, process_group=0
        )


def ask_to_stop(cluster: MiniCluster) -> None:
    (pid,) = cluster.processes(CONTROLLER, "-m vqrae_ds.launching.hostfile")
    runs.send(cluster, CONTROLLER, "TERM", pid)


def status_of(process: subprocess.Popen, seconds: float) -> int:
    try:
        return process.wait(seconds)
    finally:
        process.kill()


def test_arguments_and_environment_arrive_and_the_weights_are_those_of_one_node(cluster, folder):
    """Three ranks, two of them on one node."""
    run = folder / f"pdsh {runs.ODD}"
    env = {
        "VQRAE_ODD": runs.ODD,
        "NCCL_ODD": f"{runs.ODD}\n2",
        "OTHER": "o",
        "HF_TOKEN": "first-secret",
    }
    env |= {"PYTHON_API_KEY": "second-secret", "UCX_PASSWORD": "third-secret"}
    env |= {"OF_THE_SITE_TOKEN": "fourth-secret", "PYTHON_SECRET": "fifth-secret"}
    env |= {"VQRAE_FORWARD": "OTHER,OF_THE_SITE_TOKEN,PYTHON_SECRET"}
    job = launch(cluster, folder, run, *runs.THREE_RANKS, hostfile="uneven_hosts", **env)
    for rank, (node, local_rank) in enumerate([("n1", 0), ("n1", 1), ("n2", 0)]):
        theirs = runs.environment_of(cluster, node, runs.rank_of(cluster, node, local_rank))
        assert (theirs["RANK"], theirs["WORLD_SIZE"]) == (str(rank), "3")
        assert theirs["VQRAE_ODD"] == runs.ODD and theirs["NCCL_ODD"] == f"{runs.ODD}\n2"
        assert theirs["OTHER"] == "o" and "HF_TOKEN" not in theirs
        assert theirs["OF_THE_SITE_TOKEN"] == "fourth-secret"
        assert theirs["PYTHON_SECRET"] == "fifth-secret" and "PYTHON_API_KEY" not in theirs
    assert status_of(job, runs.START_SECONDS) == 0, (folder / "log").read_text()[-6000:]
    assert (run / DONE).exists()
    log = (folder / "log").read_text()
    assert "deepspeed.launcher.launch" in log and "-secret" not in log
    one_node = folder / "one_node"
    train(folder, 1, *runs.settings_of(one_node), *runs.THREE_RANKS, ranks=3)
    theirs = runs.weights_of(one_node, folder / "one_node_weights")
    runs.assert_same(runs.weights_of(run, folder / "pdsh_weights"), theirs)
    assert not runs.left_on(cluster)


def test_a_run_that_is_asked_to_stop_saves_and_harms_no_other(cluster, folder, straight):
    run = folder / "pdsh_asked"
    other = cluster.start(
        "n2", ["bash", "-c", "exec -a 'python -u -m deepspeed.launcher.launch' sleep 1002"]
    )
    try:
        job = launch(cluster, folder, run)
        runs.wait_for_step(run, 5, lambda: job.poll() is None)
        assert status_of(launch(cluster, folder, run), 60) == 2, "a second launch of it"
        assert " is at work on this run" in (folder / "log").read_text()
        ask_to_stop(cluster)
        assert status_of(job, 120) == PREEMPTED_STATUS
        assert (run / PREEMPTED).exists() and not (run / DONE).exists()
        assert not runs.left_on(cluster)
        assert other.poll() is None, "a launcher of another job"
    finally:
        other.send_signal(signal.SIGKILL)
    job = launch(cluster, folder, run)
    assert status_of(job, runs.START_SECONDS + 60) == 0
    runs.assert_same(runs.weights_of(run, folder / "asked_weights"), straight)


def hurt_rank(cluster: MiniCluster) -> None:
    """One of two on a node; the other one answers to nothing."""
    runs.send(cluster, "n1", "STOP", runs.rank_of(cluster, "n1", 0))
    runs.send(cluster, "n1", "KILL", runs.rank_of(cluster, "n1", 1))


def hurt_twice(cluster: MiniCluster) -> None:
    """A rank that answers to nothing; so the first signal leads nowhere."""
    runs.send(cluster, "n2", "STOP", runs.rank_of(cluster, "n2"))
    ask_to_stop(cluster)
    time.sleep(3)
    ask_to_stop(cluster)


def hurt_launcher(cluster: MiniCluster) -> None:
    """Nobody is left to end anything, but the guardians."""
    (pid,) = cluster.processes(CONTROLLER, "-m vqrae_ds.launching.hostfile")
    runs.send(cluster, CONTROLLER, "KILL", pid)


def cut_off(cluster: MiniCluster) -> None:
    """The node of rank 0, whom all others have met at."""
    cluster.cut_off("n1")


def lose_node(cluster: MiniCluster) -> None:
    """The node of rank 0, which is the launcher's too."""
    cluster.node_down("n1")


@pytest.mark.parametrize("hurt", [hurt_rank, hurt_twice, hurt_launcher, cut_off, lose_node])
def test_a_run_that_is_hurt_ends_on_all_nodes(cluster, folder, hurt):
    run = folder / f"pdsh_{hurt.__name__}"
    host = "n1" if hurt is lose_node else CONTROLLER
    if hurt is hurt_rank:
        job = launch(cluster, folder, run, *runs.THREE_RANKS, hostfile="uneven_hosts")
    else:
        job = launch(cluster, folder, run, host=host)
    try:
        runs.wait_for_step(run, 5, lambda: job.poll() is None)
        start = time.monotonic()
        hurt(cluster)
        status = status_of(job, END_SECONDS)
        assert status not in (0, PREEMPTED_STATUS)
        assert not (run / DONE).exists() and not (run / PREEMPTED).exists()
        if hurt is lose_node:
            cluster.node_up("n1")
        while left := runs.left_on(cluster):
            assert time.monotonic() < start + END_SECONDS, left
            time.sleep(0.5)
    finally:
        if hurt is cut_off:
            cluster.reconnect("n1")
