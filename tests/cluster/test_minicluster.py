"""The cluster itself: what the other tests rely on."""

from __future__ import annotations

import pytest

from tests.cluster.cluster import BUSY_SECONDS, CONTROLLER

pytestmark = pytest.mark.slow

CLUSTER = {"MC_TIMEOUT": "5"}


def test_jobs_ssh_and_what_may_befall_a_node(cluster, tmp_path):
    job = cluster.submit("-N2", "-o", tmp_path / "log", "--wrap", "srun hostname")
    assert cluster.wait_for_job(job, "COMPLETED", seconds=BUSY_SECONDS)["Restarts"] == "0"
    assert sorted((tmp_path / "log").read_text().split()) == ["n1", "n2"]
    assert cluster.ask("n1", "ssh", "n2", "hostname") == "n2\n"
    pdsh = cluster.ask(CONTROLLER, "pdsh", "-R", "ssh", "-w", "n1,n2", "hostname")
    assert sorted(pdsh.splitlines()) == ["n1: n1", "n2: n2"]

    sleeper = cluster.start("n2", ["sleep", "1001"])
    other = cluster.start("n1", ["sleep", "1001"])
    while not cluster.processes("n2", "sleep 1001"):
        pass
    assert cluster.run("n1", "pkill", "-f", "sleep 1001").returncode == 0
    other.wait(10)
    assert len(cluster.processes("n2", "sleep 1001")) == 1, "a node's processes are its own"

    cluster.cut_off("n2")
    assert cluster.run("n1", "ssh", "-o", "ConnectTimeout=2", "n2", "true").returncode == 255
    assert sleeper.poll() is None, "it lives on"
    cluster.reconnect("n2")
    assert cluster.ask("n1", "ssh", "n2", "hostname") == "n2\n"

    cluster.node_down("n2")
    assert sleeper.wait(10) != 0
    cluster.node_up("n2")
    assert cluster.ask("n1", "ssh", "n2", "hostname") == "n2\n"
