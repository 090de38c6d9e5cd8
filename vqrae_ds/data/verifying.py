"""Holds a folder of shards against its index, byte for byte: what no training has the time for."""

from __future__ import annotations

from pathlib import Path

from tqdm import tqdm

from vqrae_ds.data.index import Shard, read_index
from vqrae_ds.data.pool import map_in_order
from vqrae_ds.manifest import hash_file


def verify_shards(folder: Path, *, processes: int = 1, show_progress: bool = False) -> list[str]:
    """A line for each shard of `folder` that is not what was indexed; every byte is read.

    Raises `ValueError` where there is no index that can be read.
    """
    # One that was left out whole has no checksum.
    shards = [s for s in read_index(folder, check_shards=False).shards if s.xxh3_128]
    found = []
    with tqdm(total=len(shards), unit="shard", disable=None if show_progress else True) as progress:
        for fault in map_in_order(_fault_of, shards, processes):
            if fault is not None:
                found.append(fault)
            progress.update()
    return found


def _fault_of(shard: Shard) -> str | None:
    try:
        shard.samples()  # raises where the table is not what its own checksum says
        size, digest = hash_file(shard.path)
    except (ValueError, OSError) as error:
        return f"{shard.path}: {error}"
    if (size, digest) != (shard.size, shard.xxh3_128):
        there, listed = f"{size} bytes, xxh3 {digest}", f"{shard.size} bytes, {shard.xxh3_128}"
        return f"{shard.path} has {there}, the index says {listed}"
    return None
