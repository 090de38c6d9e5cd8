"""Ranks of a node whose sibling has ended, under DeepSpeed's launcher and a guardian's eyes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from vqrae_ds.launching.hosts import Host, write_hostfile
from vqrae_ds.launching.orders import LAUNCH
from vqrae_ds.launching.processes import Siblings, end, processes_of
from vqrae_ds.stopping import DONE, PREEMPTED

# Rank 1 fails when it is told to. The others wait for it in vain: one that stands still altogether,
# and one that notes SIGTERM, as a trainer does, and has a child.
WORKER = """
import os, signal, subprocess, sys, time
from pathlib import Path
folder, rank = Path(sys.argv[-1]), os.environ["RANK"]
signal.signal(signal.SIGTERM, lambda number, frame: None)
if rank == "2":
    subprocess.Popen(["sleep", "1004"])
(folder / f"rank{rank}").write_text(str(os.getpid()))
if rank == "0":
    os.kill(os.getpid(), signal.SIGSTOP)
while not (rank == "1" and (folder / "fail").exists()):
    time.sleep(0.1)
sys.exit(7)
"""
RUN_NODE = """
import sys
from pathlib import Path
from vqrae_ds.launching import node
sys.exit(node.run(sys.argv[2:], Path(sys.argv[1]), patience=2.0))
"""


def below(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


@pytest.mark.slow
def test_siblings_of_a_rank_that_failed_end_together_and_so_does_the_launcher(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    write_hostfile(tmp_path / "hosts", [Host("localhost", 3)])
    command = [sys.executable, "-c", RUN_NODE, str(tmp_path)]
    command += [sys.executable, "-m", "deepspeed.launcher.runner", "--no_ssh", "--node_rank", "0"]
    command += ["--hostfile", str(tmp_path / "hosts"), "--master_addr", "127.0.0.1"]
    command += ["--module", "worker", str(tmp_path)]
    search = os.pathsep.join([str(tmp_path), str(ROOT)])
    node = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": search}, cwd=tmp_path)
    processes = []
    try:
        while not all((tmp_path / f"rank{rank}").exists() for rank in range(3)):
            assert node.poll() is None
            time.sleep(0.1)
        processes = below(node.pid)
        assert sum(process.name() == "sleep" for process in processes) == 1
        (tmp_path / "fail").touch()
        began = time.monotonic()
        assert node.wait(120) == 7
        seconds = time.monotonic() - began
        assert seconds < 20, "DeepSpeed's launcher alone takes 30 s for each"
        _, alive = psutil.wait_procs(processes, timeout=5)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        node.kill()
        node.wait()


# What `launch.py` looks like from outside: a process with the mark, and ranks below it.
LAUNCHER = """
import os, subprocess, sys
ranks = [
    subprocess.Popen(["sleep", "1005"], env={**os.environ, "LOCAL_SIZE": "3"}) for _ in range(3)
]
print(*(rank.pid for rank in ranks), flush=True)
ranks[0].wait()
sys.stdin.read()
"""


@pytest.mark.parametrize("marker", [None, DONE, PREEMPTED])
def test_ranks_that_end_one_by_one_are_left_alone_where_the_run_has_its_marker(tmp_path, marker):
    mark = uuid.uuid4().hex
    siblings = Siblings(mark, tmp_path, patience=0.2)
    pipe, environment = subprocess.PIPE, {**os.environ, LAUNCH: mark}
    command = [sys.executable, "-c", LAUNCHER]
    with subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, text=True) as launcher:
        try:
            pids = [int(pid) for pid in launcher.stdout.readline().split()]
            while len(siblings.look()) < 4:
                time.sleep(0.1)
            if marker is not None:
                Path(tmp_path, marker).touch()
            psutil.Process(pids[0]).kill()
            deadline = time.monotonic() + 1.5
            while set(pids[1:]) & processes_of(mark).keys() and time.monotonic() < deadline:
                siblings.look()
                time.sleep(0.1)
            expected = {launcher.pid} if marker is None else {launcher.pid, *pids[1:]}
            assert processes_of(mark).keys() == expected
        finally:
            end(mark)
