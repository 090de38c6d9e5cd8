"""What a rank says whose data are at fault amid a training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from vqrae_ds.command_line import USER_ERRORS, in_one_line

T = TypeVar("T")


class DataFailed(RuntimeError):
    """A rank cannot read its next images; the message names rank, shard and key."""


def naming_rank(rank: int, batches: Iterator[T]) -> Iterator[T]:
    """`batches`. Raises `DataFailed` where one of them cannot be read."""
    try:
        yield from batches
    except (*USER_ERRORS, OSError) as error:
        raise DataFailed(f"rank {rank}: {in_one_line(error)}") from error


def worker_death(rank: int, error: RuntimeError) -> DataFailed:
    """What to say where a process that reads data has ended before its time.

    PyTorch raises it in the rank, wherever that is at the moment. Any other `error` is raised on.
    """
    text = " ".join(str(error).split()).removesuffix(".")
    if not text.startswith("DataLoader worker (pid"):
        raise error
    return DataFailed(
        f"rank {rank}: a process that reads data has died: {text}. Where it was killed for want of "
        "memory, lower data.num_workers, data.prefetch_batches or data.max_image_pixels"
    )
