"""A disk of a test's own, a tmpfs, that can be made full: by bytes, or by the number of files."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

DISK_BYTES, DISK_INODES = 64 << 20, 10_000


class Level(NamedTuple):
    """How much is left: of files and folders, and of bytes; None is enough."""

    inodes: int | None = None
    num_bytes: int | None = None


@contextlib.contextmanager
def mounted(path: Path) -> Iterator[Path]:
    """An empty disk at `path`; the test is skipped where none can be mounted."""
    path.mkdir(parents=True)
    options = f"size={DISK_BYTES},nr_inodes={DISK_INODES}"
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def leave(disk: Path, level: Level) -> None:
    """Make the disk so small that no more than `level` is left."""
    used = os.statvfs(disk)
    inodes, num_bytes = DISK_INODES, DISK_BYTES
    if level.inodes is not None:
        inodes = used.f_files - used.f_ffree + level.inodes
    if level.num_bytes is not None:
        blocks = used.f_blocks - used.f_bfree + level.num_bytes // used.f_frsize
        num_bytes = max(blocks, 1) * used.f_frsize  # 0 would be no limit
    options = f"remount,nr_inodes={inodes},size={num_bytes}"
    subprocess.run(["mount", "-o", options, str(disk)], check=True)
