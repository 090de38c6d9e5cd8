"""The endless, deterministic order of samples, and the batches read in it.

The order is a pure function of (seed, epoch, index): shards are shuffled over an epoch, and samples
within a shard, so that reads stay local. A place in it is ONE integer, the samples consumed by all
ranks together. A run resumes from that integer at once, with any number of ranks and workers and
any micro batch size. All ranks take equal steps: an epoch's end is nothing special to a batch.
Suffixes: B samples, 3 channels, H height, W width.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
import xxhash
from torch.utils.data import DataLoader, Dataset

from vqrae_ds.data.decode import Augmentation, SampleSeed, centre_crop, decode_sample, random_crop
from vqrae_ds.data.index import ShardIndex
from vqrae_ds.stopping import SIGNALS


class Batch(NamedTuple):
    """Images of one micro batch, and their keys."""

    images_B3HW: torch.Tensor  # float32 in [0, 1]
    keys: list[str]


class EvaluationBatch(NamedTuple):
    """A batch of one pass over the data; where `is_real_B` is False, a repeat fills it up."""

    images_B3HW: torch.Tensor  # float32 in [0, 1]
    is_real_B: torch.Tensor  # bool
    keys: list[str]


class Place(NamedTuple):
    """Where a position of the stream falls: which pass over the data, which sample of the index."""

    epoch: int
    sample: int


class SampleOrder:
    """The order of samples for one seed; each comes exactly once an epoch."""

    def __init__(self, index: ShardIndex, *, seed: int) -> None:
        self.index = index
        self.seed = seed
        self._shuffle_shards(epoch=0)

    def sample_at(self, position: int) -> Place:
        """The sample at a position 0, 1, 2, ... of the stream, in the time of a bisection."""
        epoch, position_in_epoch = divmod(position, self.index.num_samples)
        if epoch != self._epoch:
            self._shuffle_shards(epoch)
        turn = int(np.searchsorted(self._starts, position_in_epoch, side="right")) - 1
        shard = int(self._shards[turn])
        first, end = (int(start) for start in self.index.starts[shard : shard + 2])
        order = _shuffled(end - first, f"samples {self.seed} {epoch} {shard}")
        return Place(epoch, first + int(order[position_in_epoch - int(self._starts[turn])]))

    def _shuffle_shards(self, epoch: int) -> None:
        lengths = np.diff(self.index.starts)
        self._epoch = epoch
        self._shards = _shuffled(len(lengths), f"shards {self.seed} {epoch}")
        # The shard whose turn is t fills the positions from _starts[t] on.
        self._starts = np.cumsum(lengths[self._shards]) - lengths[self._shards]


def micro_batch_positions(
    *, micro_batch_size: int, rank: int, world_size: int, start: int
) -> Iterator[range]:
    """The positions of one rank's micro batches, without end, from the position `start` on."""
    for m in itertools.count():
        first = start + (m * world_size + rank) * micro_batch_size
        yield range(first, first + micro_batch_size)


def training_batches(
    index: ShardIndex,
    *,
    image_size: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    seed: int,
    start: int,
    num_workers: int,
    augmentation: Augmentation,
) -> Iterator[Batch]:
    """Endless micro batches (B, 3, image_size, image_size) of one rank, B = `micro_batch_size`.

    `start` is the number of samples that all ranks together have consumed: to resume is to pass it.
    Raises `ValueError` naming shard and key at an image that cannot be decoded.
    """
    assert 0 <= rank < world_size and micro_batch_size > 0 and start >= 0
    positions = micro_batch_positions(
        micro_batch_size=micro_batch_size, rank=rank, world_size=world_size, start=start
    )
    loader = DataLoader(
        _TrainingSet(SampleOrder(index, seed=seed), image_size, augmentation),
        batch_sampler=positions,
        collate_fn=_collate,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=_leave_stopping_to_the_rank,
        pin_memory=torch.cuda.is_available(),
        # A loader draws a number as it starts; a resumed run must not take it from the model's RNG.
        generator=torch.Generator(),
    )
    return iter(loader)


def evaluation_batches(
    index: ShardIndex, *, image_size: int, batch_size: int, rank: int, world_size: int
) -> Iterator[EvaluationBatch]:
    """One pass in index order, in batches (B, 3, image_size, image_size) with B = `batch_size`.

    Every rank gets the same number of full batches; their real samples are the data set, each once.
    Raises `ValueError` naming shard and key at an image that cannot be decoded.
    """
    assert 0 <= rank < world_size and batch_size > 0
    for first in range(0, index.num_samples, batch_size * world_size):
        numbers = range(first + rank * batch_size, first + (rank + 1) * batch_size)
        samples = [index.sample(number % index.num_samples) for number in numbers]
        images = [decode_sample(s, centre_crop, image_size=image_size) for s in samples]
        is_real_B = torch.tensor([number < index.num_samples for number in numbers])
        yield EvaluationBatch(torch.stack(images), is_real_B, [s.key for s in samples])


class _Item(NamedTuple):
    image_3HW: torch.Tensor
    key: str


class _TrainingSet(Dataset):
    """Augmented images by their position in the stream."""

    def __init__(self, order: SampleOrder, image_size: int, augmentation: Augmentation) -> None:
        self.order = order
        self.image_size = image_size
        self.augmentation = augmentation

    def __getitem__(self, position: int) -> _Item:
        epoch, number = self.order.sample_at(position)
        sample = self.order.index.sample(number)
        crop_seed = SampleSeed(self.order.seed, epoch, number)
        choose_crop = partial(random_crop, augmentation=self.augmentation, seed=crop_seed)
        return _Item(decode_sample(sample, choose_crop, image_size=self.image_size), sample.key)


def _leave_stopping_to_the_rank(_: int) -> None:
    """A signal that reaches every process of a job must not take the data from a rank that obeys.

    A worker ends when its rank ends.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _collate(items: list[_Item]) -> Batch:
    return Batch(torch.stack([item.image_3HW for item in items]), [item.key for item in items])


@lru_cache(maxsize=8)
def _shuffled(count: int, label: str) -> np.ndarray:
    """The numbers 0 .. count - 1 in a random order set by the arguments alone, int64 (count,).

    It sorts random 64-bit words: numpy promises that a bit generator's raw words stay the same in
    every version, but not what `permutation` returns, and a run must not resume in another order.
    """
    words = np.random.Philox(key=xxhash.xxh3_128_intdigest(label.encode())).random_raw(count)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False  # it is shared by all who ask
    return order
