"""Items to batches by worker processes, which read ahead and end with their rank.

Suffixes: B samples, 3 channels, H height, W width.
"""

from __future__ import annotations

import multiprocessing
import signal
import warnings
from collections.abc import Iterable, Iterator
from multiprocessing import util
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from vqrae_ds.data.faults import Skipped
from vqrae_ds.stopping import SIGNALS


class Item(NamedTuple):
    """An image, its key, and what could not be used before it, or in its place."""

    image_3HW: torch.Tensor
    key: str
    skipped: tuple[Skipped, ...] = ()


class Batch(NamedTuple):
    """Images of one micro batch, their keys, and the samples that could not be used."""

    images_B3HW: torch.Tensor  # float32 in [0, 1]
    keys: list[str]
    skipped: list[Skipped] = []


def load(
    samples: Dataset, positions: Iterable[range] | None, num_workers: int, prefetch_batches: int
) -> Iterator[Batch]:
    """The batches of `samples` at `positions`, in their order whatever the number of workers.

    Without `positions` the samples come in batches already, as lists of items. Each worker is
    `prefetch_batches` ahead. Memory is pinned where there is a GPU.
    """
    how = {"batch_size": None} if positions is None else {"batch_sampler": positions}
    return read_ahead(samples, num_workers, prefetch_batches, collate_fn=_collate, **how)


def read_ahead(
    samples: Dataset, num_workers: int, prefetch_batches: int, **how: Any
) -> Iterator[Any]:
    """What a `DataLoader` of these workers gives; `how` are other arguments of it."""
    in_processes = {
        # A child of its rank notices that the rank is gone; one of a server that forks does not.
        "multiprocessing_context": "fork",
        "persistent_workers": True,
        "prefetch_factor": prefetch_batches,
        "worker_init_fn": _leave_stopping_to_the_rank,
    }
    with warnings.catch_warnings():
        # More workers than cores is for the user to choose; every rank would say the same.
        warnings.filterwarnings("ignore", "This DataLoader will create")
        loader = DataLoader(
            samples,
            **how,
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            # A loader draws a number as it starts; a resumed run must not take it from the model's.
            generator=torch.Generator(),
            **(in_processes if num_workers else {}),
        )
        if num_workers:
            util.Finalize(None, _end_workers, exitpriority=0)
        return iter(loader)


def _leave_stopping_to_the_rank(_: int) -> None:
    """A signal that reaches every process of a job must not take the data from a rank that obeys.

    A worker ends when its rank ends.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _end_workers() -> None:
    """At the exit of Python, which else asks them by a signal that they ignore, and waits."""
    # PyTorch's handler would raise that a worker was killed, after the last word of the process.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _collate(items: list[Item]) -> Batch:
    return Batch(
        torch.stack([item.image_3HW for item in items]),
        [item.key for item in items],
        [skipped for item in items for skipped in item.skipped],
    )
