"""Writes tar files of any members, also of those that no shard should have."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

from vqrae_ds.data.indexing import index_shards


def write_tar(path: Path, members: Iterable[tuple[str, bytes]]) -> Path:
    """Members by name and content, in their order; a name may come twice."""
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_two_shards(folder: Path) -> Path:
    """Two shards of ten members of 700 bytes, indexed."""
    for s in range(2):
        write_tar(folder / f"{s}.tar", ((f"{s}_{i}.png", bytes([65 + i]) * 700) for i in range(10)))
    index_shards(folder)
    return folder
