"""Whether there is room: for the next save before it begins, and for a run's at its start."""

from __future__ import annotations

import contextlib
import logging
import platform
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch.distributed as dist

from vqrae_ds import manifest
from vqrae_ds.checkpoint.frozen import bytes_of_others
from vqrae_ds.checkpoint.names import checkpoints_folder, local_root
from vqrae_ds.config import Run
from vqrae_ds.ranks import from_rank_0, gather
from vqrae_ds.sharding.ema import WeightAverage
from vqrae_ds.sharding.partitions import saved_bytes

logger = logging.getLogger(__name__)

_RELATIVE_MARGIN, _MARGIN_BYTES = 0.01, 1 << 20  # pickled names, JSON, blocks that are not full


class Shortage(NamedTuple):
    """A disk that what is to be written does not fit on, and the rank that looked."""

    rank: int
    folder: Path
    needed: int
    free: int

    def __str__(self) -> str:
        return (
            f"rank {self.rank}: {self.folder}: {in_units(self.needed)} are needed "
            f"and {in_units(self.free)} are free"
        )


class _Share(NamedTuple):
    """What one rank writes, and where: ranks of the same `disk` share its free space."""

    disk: str
    own_bytes: int
    shortage: Shortage


def own_bytes(
    generator: Any,
    discriminator: Any,
    ema: WeightAverage | None = None,
) -> int:
    """Bytes that this rank is going to write of the engines, computed from what it holds."""
    total = sum(saved_bytes(engine) for engine in (generator, discriminator) if engine is not None)
    if ema is not None:
        total += sum(average.nbytes for each in ema.state_dict().values() for average in each)
    if dist.get_rank() == 0:
        total += bytes_of_others(generator)
    return total


def find_shortage(folder: Path, own_bytes: int, *, on_each_node: bool = False) -> Shortage | None:
    """The first disk without room for what its ranks write below `folder`; all ranks call it.

    One disk serves all ranks, or, `on_each_node`, each node has its own. Where a disk cannot be
    asked nothing is found: the save itself will meet the error.
    """
    mine = None
    with contextlib.suppress(OSError):
        place = _existing(folder)
        disk = f"{platform.node()}:{place.stat().st_dev}" if on_each_node else ""
        free = shutil.disk_usage(place).free
        mine = _Share(disk, own_bytes, Shortage(dist.get_rank(), folder, 0, free))
    shares = [share for share in gather(mine) if share is not None]
    for disk in dict.fromkeys(share.disk for share in shares):
        here = [share for share in shares if share.disk == disk]
        needed = sum(share.own_bytes for share in here)
        needed += int(needed * _RELATIVE_MARGIN) + _MARGIN_BYTES
        if needed > here[0].shortage.free:
            return here[0].shortage._replace(needed=needed)
    return None


def warn_of_shortage(
    run: Run,
    generator: Any,
    discriminator: Any,
    ema: WeightAverage | None = None,
) -> None:
    """Say at the start of a run where its checkpoints will not fit; all ranks call it."""
    config = run.config.checkpoint
    number = config.most_at_once(run.schedule.total_steps)
    mine = own_bytes(generator, discriminator, ema)
    checkpoints = checkpoints_folder(run)
    there = from_rank_0(lambda: _bytes_of_checkpoints(checkpoints))  # part of that number
    share = max(number * mine - there // dist.get_world_size(), 0)
    found = [find_shortage(checkpoints, share)]
    if config.local_dir is not None:
        found.append(find_shortage(local_root(run), mine, on_each_node=True))
    for shortage in filter(None, found):
        logger.warning("the checkpoints of this run may not fit: %s", shortage)


def in_units(num_bytes: int) -> str:
    """A size in GB, or in MB where that is less than one."""
    unit, name = (10**9, "GB") if num_bytes >= 10**9 else (10**6, "MB")
    return f"{num_bytes / unit:.2f} {name}"


def _bytes_of_checkpoints(checkpoints: Path) -> int:
    complete = manifest.complete_steps(checkpoints)
    return sum(manifest.read_manifest(folder).num_bytes for folder in complete)


def _existing(path: Path) -> Path:
    """`path`, or the first folder above it that there is."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path
