"""A job of SLURM, seen from within: its nodes, what SLURM calls it, back into the queue.

The controller is away for a moment when it is restarted or has too much to do. Who takes that for
an answer loses a job that has saved. So it is asked again for some minutes, unless SLURM itself
says no.
"""

from __future__ import annotations

import logging
import os
import re
import subprocess
import time
from typing import NamedTuple

from vqrae_ds.launching.hosts import Host

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 300.0  # about what --signal leaves before the time limit
PAUSE_SECONDS = 5.0
UNKNOWN = "Invalid job id"
# SLURM's own refusals, where asking again is in vain. All else may be a controller that is away:
# to `scontrol requeue` that is an "Unexpected message received" (22.05).
_REFUSALS = (UNKNOWN, "presently disabled", "denied", "pending execution", "already")


class Refused(Exception):
    """What was asked is not done; the message is SLURM's reason."""


class JobState(NamedTuple):
    """What SLURM calls a job: RUNNING, PENDING, COMPLETING (cancelled, or out of time) and so on.

    `is_preempted`: in this start another job was given its nodes, and it has a time of grace.
    """

    name: str
    is_preempted: bool = False


def job_id() -> int:
    """The number of the job that this process is in; raises `ValueError` outside of one."""
    return int(_of_slurm("SLURM_JOB_ID"))


def hosts_of_job() -> list[Host]:
    """The nodes of this allocation, and the ranks on each, RANKS_PER_NODE or its GPUs.

    Raises `ValueError` outside an allocation, and where the number of ranks is not known.
    """
    slots = os.environ.get("RANKS_PER_NODE") or os.environ.get("SLURM_GPUS_ON_NODE") or ""
    if not slots.isdecimal() or int(slots) == 0:
        raise ValueError(
            f"{slots!r} is not a number of ranks: set RANKS_PER_NODE, or ask SLURM for GPUs"
        )
    nodes = subprocess.run(
        ["scontrol", "show", "hostnames", _of_slurm("SLURM_JOB_NODELIST")],
        check=True,
        capture_output=True,
        text=True,
    )
    return [Host(name, int(slots)) for name in nodes.stdout.split()]


def state_of(job: int) -> JobState:
    """The state of a job. Raises `Refused`, with `UNKNOWN` in it for a job that SLURM has not."""
    words = dict(re.findall(r"(\w+)=(\S*)", _ask("show", "job", str(job), "--oneliner")))
    preempted = words.get("PreemptTime", "None")
    # A time of an earlier start is not meant; both are of the form 2030-01-31T23:59:59.
    is_preempted = preempted != "None" and preempted >= words.get("StartTime", "")
    return JobState(words["JobState"], is_preempted)


def requeue(job: int, *, hold: bool = False) -> None:
    """Put a running job back into the queue; `hold`: it waits there until a user releases it.

    Raises `Refused`.
    """
    _ask("requeuehold" if hold else "requeue", str(job))


def _ask(*words: str) -> str:
    """What scontrol prints."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True)
        if done.returncode == 0:
            return done.stdout
        reason = done.stderr.strip() or f"scontrol ended with status {done.returncode}"
        if any(sign in reason for sign in _REFUSALS) or time.monotonic() > deadline:
            raise Refused(reason)
        logger.warning("asking again: scontrol %s: %s", words[0], reason)
        time.sleep(PAUSE_SECONDS)


def _of_slurm(name: str) -> str:
    if name not in os.environ:
        raise ValueError(f"{name} is not set: this runs in a job, sbatch launchers/slurm.sbatch")
    return os.environ[name]
