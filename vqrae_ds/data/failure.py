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
