"""The bytes of one sample out of its shard, within a limit."""

from __future__ import annotations

import contextlib
import os
from functools import lru_cache
from pathlib import Path

from vqrae_ds.data.faults import MISSING_SHARD, RESIZED_SHARD, TOO_LONG, UNREADABLE, BadSample
from vqrae_ds.data.index import Sample

_OPEN_SHARDS = 16  # a process reads from one shard at a time, or two where it changes


class _OpenFile:
    """A descriptor that is closed when nobody remembers it any more."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.size = os.fstat(self.descriptor).st_size

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def read_sample(sample: Sample, max_bytes: int) -> bytes:
    """Raises `BadSample` where it is longer than `max_bytes`, or its shard does not have it.

    What the file system does not give is asked for twice: a descriptor may be what is stale.
    """
    if sample.length > max_bytes:
        raise BadSample(f"{sample.length} bytes is over the limit of {max_bytes}", TOO_LONG)
    # Left before the second attempt, lest the error keep the old descriptor open.
    with contextlib.suppress(OSError, BadSample):
        return _read(sample)
    _open.cache_clear()
    try:
        return _read(sample)
    except FileNotFoundError as error:
        raise BadSample("the shard is missing", MISSING_SHARD) from error
    except OSError as error:
        raise BadSample(f"the shard cannot be read: {error}", UNREADABLE) from error


def _read(sample: Sample) -> bytes:
    shard = _open(sample.shard)
    if sample.shard_size not in (None, shard.size):
        sizes = f"{shard.size} bytes, the index says {sample.shard_size}"
        raise BadSample(f"the shard has {sizes}", RESIZED_SHARD)
    data = os.pread(shard.descriptor, sample.length, sample.offset)
    while len(data) < sample.length and (
        more := os.pread(shard.descriptor, sample.length - len(data), sample.offset + len(data))
    ):
        data += more
    if len(data) < sample.length:
        changed = "the shard ends inside the image, it has changed since it was indexed"
        raise BadSample(changed, RESIZED_SHARD)
    return data


@lru_cache(maxsize=_OPEN_SHARDS)
def _open(path: Path) -> _OpenFile:
    return _OpenFile(path)
