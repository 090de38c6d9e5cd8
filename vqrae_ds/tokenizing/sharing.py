"""Who tokenizes which shard: no rank waits for another, and nobody has to know who is alive.

A rank begins with every W-th shard, a pure function of its number and that of the ranks. When it is
done it helps the others, from the end of the list, so that a slow rank holds nobody up. That no two
do the same work is left to locks on the bytes of one file, byte s for shard s: the kernel, or the
file server, takes them from a process however it ends, so that no claim outlives a kill -9. The
locks save work, no more: a shard appears whole under its name or not at all, so where two should
have made the same one, one of two sound files stays. Where a file system knows no locks, each rank
does its own share alone.
"""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from vqrae_ds.worker import Worker

_BUSY = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


class Turn(NamedTuple):
    """A shard in the order of a worker, of its own share or of another's."""

    shard: int
    is_own: bool


def turns(num_shards: int, worker: Worker) -> Iterator[Turn]:
    """All shards, a worker's own first; then others', the last first, as it finds them unfinished.

    Workers begin to help at different places.
    """
    for shard in range(worker.rank, num_shards, worker.world_size):
        yield Turn(shard, is_own=True)
    others = [s for s in reversed(range(num_shards)) if s % worker.world_size != worker.rank]
    first = worker.rank * len(others) // worker.world_size
    for shard in others[first:] + others[:first]:
        yield Turn(shard, is_own=False)


class Claims:
    """The shards that this process works on, known to all that see the file."""

    def __init__(self, path: Path) -> None:
        """Only one may be open in a process: closing another one would let go of its locks."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def take(self, turn: Turn) -> bool:
        """Whether the shard is this process's now; False where another one is at it."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, turn.shard)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return turn.is_own
            if error.errno not in _BUSY:
                raise
            return False
        return True

    def let_go(self, shard: int) -> None:
        """The shard is finished, or not to be done."""
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, shard)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise

    def close(self) -> None:
        """Let go of all."""
        os.close(self._descriptor)
