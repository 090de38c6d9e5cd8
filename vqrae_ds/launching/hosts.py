"""The nodes of a run: from a hostfile, from SLURM's allocation, or this machine alone."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

LOCAL = "localhost"
_LINE = re.compile(r"(?P<name>[A-Za-z0-9_][\w.:-]*)\s+slots=(?P<slots>\d+)(\s.*)?")


class Host(NamedTuple):
    """A node, and how many ranks are to run on it; 0 where as many as it has GPUs."""

    name: str
    slots: int


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a hostfile: a line `NAME slots=N` each, `#` begins a comment.

    Stricter than DeepSpeed 0.19.8 (`_parse_hostfile` of launcher/runner.py), which reads
    `slots=8x` as 8, and without a word starts on one machine where the file is missing. Raises
    `ValueError` naming the line.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not text"
        raise ValueError(
            f"--hostfile {path}: {reason}; DeepSpeed would start on this machine alone. "
            "Write a line `NAME slots=GPUS` for each node"
        ) from error
    hosts: dict[str, Host] = {}
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        where = f"--hostfile {path}: line {number}, {text!r}"
        if match is None:
            raise ValueError(f"{where}, is not of the form `NAME slots=N`")
        host = Host(match["name"], int(match["slots"]))
        if host.slots == 0:
            raise ValueError(f"{where}, gives no slot to {host.name}: remove the line instead")
        if host.name in hosts:
            raise ValueError(f"{where}, names {host.name} a second time: add up its slots")
        hosts[host.name] = host
    if not hosts:
        raise ValueError(f"--hostfile {path} names no host: write a line `NAME slots=GPUS` each")
    return list(hosts.values())


def slurm_hosts(slots: int) -> list[Host]:
    """The nodes of the SLURM allocation that this process is in, each with `slots`.

    With 0 it is SLURM_NTASKS_PER_NODE if the job has that, else the GPUs of a node. Raises
    `ValueError` outside an allocation.
    """
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        raise ValueError("--slurm: there is no SLURM_JOB_NODELIST here; use it in sbatch or salloc")
    try:
        listed = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"--slurm: scontrol cannot be run: {error}") from error
    names = listed.stdout.split()
    if listed.returncode or not names:
        raise ValueError(f"--slurm: scontrol show hostnames {nodes}: {listed.stderr.strip()}")
    given = os.environ.get("SLURM_NTASKS_PER_NODE", "")
    if slots == 0 and given.isdecimal():
        slots = int(given)
    return [Host(name, slots) for name in names]
