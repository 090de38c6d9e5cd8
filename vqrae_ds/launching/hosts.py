"""Hostfiles: which nodes, and how many ranks on each.

A line is `NAME slots=N`; `#` begins a comment. DeepSpeed's launcher takes a file that is not there
for a wish to train on this machine alone, and says so in one line among hundreds.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

# A name goes to pdsh, which would expand brackets and commas, and to ssh, which reads options.
_LINE = re.compile(r"(?P<name>(?:[\w.-]+@)?\w[\w.-]*)\s+slots=(?P<slots>[1-9]\d*)", re.ASCII)


_FIRST_PORT, _NUM_PORTS = 20000, 10000  # below the ports that Linux gives away by itself


class Host(NamedTuple):
    """A node, and the number of ranks on it."""

    name: str
    slots: int


def port_of(number: int) -> int:
    """A port for the ranks' rendezvous: numbers that differ seldom share one."""
    return _FIRST_PORT + number % _NUM_PORTS


def port_of_run(folder: Path) -> int:
    """A port by a run's folder: runs that share a node seldom share it."""
    return port_of(zlib.crc32(str(Path(folder).absolute()).encode()))


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a file, in order; the first one has rank 0.

    Raises `ValueError` with one line where the file is missing or empty, a line means nothing, or
    a host is there twice.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"hostfile {path} is not a file; a line of one is: NAME slots=8")
    hosts: list[Host] = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = _LINE.fullmatch(text)
        if match is None:
            raise ValueError(f"{path}, line {number}: {text!r} is not of the form: NAME slots=8")
        if match["name"] in {host.name for host in hosts}:
            raise ValueError(f"{path}, line {number}: {match['name']} is there twice")
        hosts.append(Host(match["name"], int(match["slots"])))
    if not hosts:
        raise ValueError(f"hostfile {path} names no host; a line of one is: NAME slots=8")
    return hosts


def write_hostfile(path: Path, hosts: Sequence[Host]) -> None:
    """Write what `read_hostfile` and DeepSpeed read."""
    Path(path).write_text("".join(f"{host.name} slots={host.slots}\n" for host in hosts))
