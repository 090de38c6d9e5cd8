"""Stands on a node of a hostfile job: tells what lives there, and ends it when it must.

    ssh NODE python -m vqrae_ds.launching.guardian MARK FILE SILENCE

MARK is in the environment of every process of the launch, and of no other, so nothing is ever
ended by its name. FILE must be readable here, or else the file system is not a shared one.

Every few seconds it writes how many processes of the launch there are, and expects a line in
return. It ends them all, and itself, on the line `end`, when its connection is closed, and after
SILENCE seconds without a line: then this node is cut off, or the launcher is gone, and the job
goes on elsewhere or nowhere.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import time
from pathlib import Path

from vqrae_ds.command_line import run_tool
from vqrae_ds.launching.orders import LAUNCH

INTERVAL = 2.0  # seconds between two reports
END = "end"


def main() -> None:
    """Watch until the job is over."""
    mark, path, silence = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path} cannot be read here: the run's folder must be on a shared disk")
    try:
        _watch(mark, silence)
    finally:
        end(mark)
    _report(mark)


def processes_of(mark: str) -> list[int]:
    """The pids of the processes on this machine that have the mark in their environment."""
    wanted, found = f"{LAUNCH}={mark}".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


def end(mark: str, seconds: float = 10.0) -> list[int]:
    """Kill the processes with the mark, and those that they start meanwhile; what is left then."""
    deadline = time.monotonic() + seconds
    while (left := processes_of(mark)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    return left


def _watch(mark: str, silence: float) -> None:
    heard = time.monotonic()
    while time.monotonic() - heard < silence:
        _report(mark)
        readable, _, _ = select.select([0], [], [], INTERVAL)
        if readable:
            words = os.read(0, 4096).decode().split()
            if not words or END in words:
                return
            heard = time.monotonic()
        time.sleep(INTERVAL / 4)


def _report(mark: str) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more: silence will tell
        os.write(1, f"{len(processes_of(mark))}\n".encode())


if __name__ == "__main__":
    run_tool(main)
