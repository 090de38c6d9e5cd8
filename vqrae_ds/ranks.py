"""What ranks tell one another beside tensors: small objects, and that something failed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from vqrae_ds.command_line import USER_ERRORS


def gather(mine: Any) -> list[Any]:
    """The objects of all ranks, in their order."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone


def from_rank_0(make: Callable[[], Any]) -> Any:
    """What `make` gives on rank 0, on every rank. Where it fails there it fails on all."""
    made = [None]
    with failing_together():
        if dist.get_rank() == 0:
            made = [make()]
    dist.broadcast_object_list(made, src=0)
    return made[0]


@contextlib.contextmanager
def failing_together() -> Iterator[None]:
    """What fails on one rank fails on all: alone it would leave its peers waiting for it.

    A user's mistake, or an error of the system, is raised on the others as the same; all else, our
    own mistakes, as a `RuntimeError` with the number of the rank.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    for rank, failure in enumerate(gather(own and _to_peers(own))):
        if failure is not None:
            kind, text = failure
            error = own or kind(text)
            error.first_rank = rank
            raise error


def is_said_by_peer(error: Exception, rank: int) -> bool:
    """Whether `failing_together` raised it on all ranks, and not `rank` is the first it came from.

    One line for a mistake is enough, however many ranks there are.
    """
    return getattr(error, "first_rank", rank) != rank


def _to_peers(error: Exception) -> tuple[type[Exception], str]:
    for kind in (*USER_ERRORS, OSError):
        if isinstance(error, kind):
            return kind, str(error)
    return RuntimeError, f"rank {dist.get_rank()} failed: {error!r}"
