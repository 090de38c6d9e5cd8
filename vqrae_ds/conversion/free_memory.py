"""How much memory this process may still take: what the machine has, and what its job allows.

A batch system, or a container, holds a job to a limit by a control group: on a node with 500 GB
free, a job of 8 GB is killed at its own. Linux only: its files are described in the kernel's
Documentation/admin-guide, cgroup-v2.rst and cgroup-v1/memory.rst.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple


class _Version(NamedTuple):
    """Where the groups of a version of control groups lie, and what their files are called."""

    hierarchy: re.Pattern[str]  # the line of /proc/self/cgroup that names the process's group
    mount: str
    limit: str
    usage: str
    cache: str  # begin of the lines of memory.stat with what is dropped where memory is short


_VERSIONS = (
    _Version(re.compile(r"^0::(.*)$", re.M), "", "memory.max", "memory.current", ""),
    _Version(
        re.compile(r"^\d+:(?:\w+,)*memory(?:,\w+)*:(.*)$", re.M),
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_",
    ),
)


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that may be taken without swapping and without being killed; file caches count as free.

    `root` is where `proc` and `sys` are.
    """
    return max(min([_free_on_machine(root), *_free_in_groups(root)]), 0)


def _free_on_machine(root: Path) -> int:
    meminfo = root / "proc/meminfo"
    found = meminfo.is_file() and re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    if found:
        return int(found[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _free_in_groups(root: Path) -> list[int]:
    """What is left in the process's group and in each one above it, as far as they have limits."""
    membership = root / "proc/self/cgroup"
    if not membership.is_file():
        return []
    groups, free = membership.read_text(), []
    for version in _VERSIONS:
        mount = root / "sys/fs/cgroup" / version.mount
        for path in version.hierarchy.findall(groups):
            group = mount / path.strip("/")
            # In a container the path may be one of the host, where only the mount itself is seen.
            for place in [group, *(g for g in group.parents if g.is_relative_to(mount))]:
                if (left := _left_in(place, version)) is not None:
                    free.append(left)
    return free


def _left_in(group: Path, version: _Version) -> int | None:
    try:
        limit = (group / version.limit).read_text().strip()
        usage = int((group / version.usage).read_text())
        stat = (group / "memory.stat").read_text()
    except OSError:  # no such group, or one without a limit on memory
        return None
    if limit == "max":
        return None
    pattern = rf"^{version.cache}(?:in)?active_file (\d+)$"
    return int(limit) - usage + sum(map(int, re.findall(pattern, stat, re.M)))
