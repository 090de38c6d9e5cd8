"""A rank whose peer is killed says so in one line; any other error keeps its traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

RANK = """
import os, signal, sys
import torch
import torch.distributed as dist
from vqrae_ds.command_line import configure_logging, end_process_after
from vqrae_ds.lost_process import ending_when_one_is_lost

def main():
    rank = int(sys.argv[1])
    configure_logging(rank)
    with ending_when_one_is_lost(rank):
        store = f"file://{sys.argv[2]}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
        if sys.argv[3] == "mistake":
            torch.zeros(2).view(3)
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(1000):
            dist.all_reduce(torch.ones(1000))

end_process_after(main)
"""


def survivor(folder: Path, fault: str, level: str = "INFO") -> subprocess.CompletedProcess[str]:
    """The end of rank 0 of two."""
    environment = {**os.environ, "VQRAE_LOG_LEVEL": level}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(folder / "store"), fault],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    return subprocess.CompletedProcess([], ranks[0].returncode, stderr=said[0])


@pytest.mark.parametrize("level", ["INFO", "DEBUG"])
def test_a_killed_peer_is_one_line_and_a_traceback_for_those_who_ask(tmp_path, level):
    done = survivor(tmp_path, "kill", level)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if " ERROR " in line]
    assert " ERROR rank 0: a peer is gone: " in line
    assert "This is typically" not in line and "pair.cc" not in line
    assert "error: " not in done.stderr or level == "DEBUG", "that is the mark of a cause"
    assert ("Traceback" in done.stderr) is (level == "DEBUG")
    assert ("the loss was found here" in done.stderr) is (level == "DEBUG")


def test_an_error_of_another_kind_passes(tmp_path):
    done = survivor(tmp_path, "mistake")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "shape '[3]' is invalid" in done.stderr
    assert "a peer is gone" not in done.stderr
