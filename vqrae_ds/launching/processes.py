"""The processes of one launch on this machine: found by a mark, ended together.

The mark is in the environment of every process of the launch, and of no other, so nothing is ever
ended by its name.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from vqrae_ds.launching.orders import LAUNCH
from vqrae_ds.stopping import DONE, PREEMPTED

logger = logging.getLogger(__name__)

# Ranks that fail together leave within it, and those that hang together write their stacks: a
# `watchdog` looks every 5 s.
PATIENCE = 10.0  # seconds


class Process(NamedTuple):
    """`num_ranks`: how many DeepSpeed's launcher starts here, told to them; else 0.

    What a rank starts inherits it.
    """

    parent: int
    num_ranks: int


def processes_of(mark: str) -> dict[int, Process]:
    """The processes on this machine that have the mark in their environment, by pid."""
    wanted, found = f"{LAUNCH}={mark}".encode(), {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            environment = (folder / "environ").read_bytes().split(b"\0")
            if wanted in environment:
                parent = after_name((folder / "stat").read_text())[1]
                sizes = [entry[11:] for entry in environment if entry.startswith(b"LOCAL_SIZE=")]
                found[int(folder.name)] = Process(int(parent), int(sizes[0]) if sizes else 0)
    return found


def after_name(stat: str) -> list[str]:
    """The fields of /proc/PID/stat from the third on, which follow the name; none of no text.

    proc(5): the first ones are state and parent, the twentieth is when the process began, in ticks
    since the machine's start. The name is in brackets and may have any character.
    """
    return stat.rpartition(")")[2].split()


def end(mark: str, seconds: float = 10.0) -> dict[int, Process]:
    """Kill the processes with the mark, and those that they start meanwhile; what is left then."""
    deadline = time.monotonic() + seconds
    while (left := processes_of(mark)) and time.monotonic() < deadline:
        _kill(left)
        time.sleep(0.1)
    return left


class Siblings:
    """The ranks of a launch on this node: where one fails, the others do not outlive it for long.

    DeepSpeed's launcher (terminate_process_tree in deepspeed/launcher/launch.py) asks them to end
    one after another, and waits 30 s for each. A rank only notes that, and one that waits in a
    collective for the dead one never gets to obey: 4 minutes for a node of 8, in which no other
    node hears of anything.
    """

    def __init__(self, mark: str, run_folder: Path, patience: float = PATIENCE) -> None:
        """`patience`: after so many seconds with fewer ranks than were started they are killed."""
        self._mark, self._patience = mark, patience
        self._markers = [Path(run_folder) / name for name in (DONE, PREEMPTED)]
        self._since: float | None = None

    def look(self) -> dict[int, Process]:
        """Kill the ranks if it is time; the processes of the launch before that, by pid.

        To be called every few seconds. A run that has left its marker ends by itself.
        """
        processes = processes_of(self._mark)
        ranks = [process for process in processes.values() if _is_rank(process, processes)]
        are_all_there = not ranks or len(ranks) >= ranks[0].num_ranks
        if are_all_there or any(path.exists() for path in self._markers):
            self._since = None
        elif self._since is None:
            self._since = time.monotonic()
        elif time.monotonic() - self._since > self._patience:
            logger.warning(
                "of this node's %d ranks %d are left: killing them", ranks[0].num_ranks, len(ranks)
            )
            _kill(pid for pid, process in processes.items() if process.num_ranks)
        return processes


def _is_rank(process: Process, processes: dict[int, Process]) -> bool:
    """Whether it is a child of DeepSpeed's launcher, and not of a rank."""
    parent = processes.get(process.parent)
    return process.num_ranks > 0 and parent is not None and parent.num_ranks == 0


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
