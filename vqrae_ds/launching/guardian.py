"""Stands on a node of a hostfile job: tells what lives there, and ends it when it must.

    ssh NODE python -m vqrae_ds.launching.guardian MARK FILE SILENCE

MARK is that of the launch (`processes`). FILE, RUN/launch/orders.json, must be readable here, or
else the file system is not a shared one.

Every few seconds it writes how many processes of the launch there are, behind `REPORT`, and
expects a line in return. It ends them all, and itself, on the line `end`, when its connection is
closed, and after SILENCE seconds without a line: then this node is cut off, or the launcher is
gone, and the job goes on elsewhere or nowhere. Where one rank has failed it ends the node's others.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import time
from pathlib import Path

from vqrae_ds.command_line import run_tool
from vqrae_ds.launching.processes import Siblings, end, processes_of

INTERVAL = 2.0  # seconds between two reports
REPORT = "vqrae-guardian "  # a greeting of the login shell has none
END = "end"


def main() -> None:
    """Watch until the job is over."""
    mark, path, silence = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3])
    if not os.access(path, os.R_OK):
        raise ValueError(f"{path} cannot be read here: the run's folder must be on a shared disk")
    try:
        _watch(Siblings(mark, path.parent.parent), silence)
    finally:
        end(mark)
    _report(len(processes_of(mark)))


def _watch(siblings: Siblings, silence: float) -> None:
    heard = time.monotonic()
    while time.monotonic() - heard < silence:
        _report(len(siblings.look()))
        readable, _, _ = select.select([0], [], [], INTERVAL)
        if readable:
            words = os.read(0, 4096).decode().split()
            if not words or END in words:
                return
            heard = time.monotonic()
        time.sleep(INTERVAL / 4)


def _report(count: int) -> None:
    with contextlib.suppress(OSError):  # nobody listens any more: silence will tell
        os.write(1, f"\n{REPORT}{count}\n".encode())  # a greeting may lack the end of its line


if __name__ == "__main__":
    run_tool(main)
