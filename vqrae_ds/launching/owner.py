"""Who launched a run: a file in its folder, so that no second launch ruins the first one.

Two launches of one run would remove each other's markers, and the checkpoint that the other is
writing. A launch that has ended without a word, be it by kill -9 or with its machine, owns nothing:
SLURM is asked about a job, /proc about a process, on another machine over ssh.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import subprocess
from pathlib import Path
from typing import NamedTuple

from vqrae_ds.launching.nodes import ssh_options
from vqrae_ds.launching.processes import after_name
from vqrae_ds.launching.slurm_job import UNKNOWN, Refused, state_of

logger = logging.getLogger(__name__)

# A job that waits in the queue owns nothing: it looks again when it starts.
_LIVING = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "STOPPED")
_DEAD_MACHINE = ("timed out", "No route to host")  # as ssh says it


class Owner(NamedTuple):
    """A process on a machine, or the job that it is the batch script of, the same in every start.

    `began` is when the process began, in ticks of the machine's clock: pids are used again.
    """

    host: str
    pid: int
    began: str
    job: int | None = None
    cluster: str = ""

    def __str__(self) -> str:
        process = f"process {self.pid} on {self.host}"
        return process if self.job is None else f"job {self.job}"


def this_process(job: int | None = None) -> Owner:
    """This process, as the launcher of a run."""
    cluster = os.environ.get("SLURM_CLUSTER_NAME", "")
    pid = os.getpid()
    return Owner(platform.node(), pid, _began(_stat(pid)), job, cluster)


def take(path: Path, own: Owner) -> None:
    """Write the owner of a run down.

    Raises `ValueError` with one line where another one lives, or cannot be asked.
    """
    theirs = Owner(**json.loads(path.read_text())) if path.is_file() else own
    if not _is_same(theirs, own):
        way_out = f"if it has ended, remove {path}"
        if (is_alive := _is_alive(theirs)) is None:
            raise ValueError(f"{theirs} has launched this run and cannot be asked: {way_out}")
        if is_alive:
            raise ValueError(f"{theirs} is at work on this run: wait for its end, or end it")
        logger.info("taking the run over from %s, which is gone", theirs)
    partial = path.with_name(f"{path.name}.{own.host}.{own.pid}")
    partial.write_text(json.dumps(own._asdict()))
    os.replace(partial, path)


def release(path: Path, own: Owner) -> None:
    """Nobody owns the run any more, unless it is another launch's by now."""
    if path.is_file() and Owner(**json.loads(path.read_text())) == own:
        path.unlink()


def _is_same(one: Owner, other: Owner) -> bool:
    if one.job is not None:
        return (one.job, one.cluster) == (other.job, other.cluster)
    return one == other


def _is_alive(owner: Owner) -> bool | None:
    """Whether the owner is at work; `None` where nobody knows."""
    try:
        return _is_process(owner) if owner.job is None else _is_job(owner)
    except FileNotFoundError:  # no scontrol, no ssh
        return None


def _is_job(owner: Owner) -> bool | None:
    if owner.cluster != os.environ.get("SLURM_CLUSTER_NAME", owner.cluster):
        return None
    try:
        return state_of(owner.job).name in _LIVING
    except Refused as refused:
        return False if UNKNOWN in str(refused) else None


def _is_process(owner: Owner) -> bool | None:
    if owner.host == platform.node():
        return _began(_stat(owner.pid)) == owner.began
    look = ["ssh", *ssh_options(), owner.host, "cat", f"/proc/{owner.pid}/stat"]
    answer = subprocess.run(look, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if answer.returncode == 255:  # of ssh itself
        return False if any(sign in answer.stderr for sign in _DEAD_MACHINE) else None
    return _began(answer.stdout) == owner.began


def _stat(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _began(stat: str) -> str:
    fields = after_name(stat)
    return fields[19] if fields else ""
