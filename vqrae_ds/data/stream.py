"""Batches of images, read in the order of `order`: endless for training, one pass for evaluation.

A run resumes at once from ONE integer, the samples consumed by all ranks together, with any number
of ranks and workers and any micro batch size. All ranks take equal steps: an epoch's end is nothing
special to a batch.
Suffixes: B samples, 3 channels, H height, W width.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from vqrae_ds.data.crops import Augmentation, SampleSeed, centre_crop, random_crop
from vqrae_ds.data.decode import decode_sample
from vqrae_ds.data.index import ShardIndex
from vqrae_ds.data.order import SampleOrder, micro_batch_positions
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
        _TrainingSet(index, image_size, augmentation, seed=seed),
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

    def __init__(
        self, index: ShardIndex, image_size: int, augmentation: Augmentation, *, seed: int
    ) -> None:
        self.index, self.order = index, SampleOrder(index.samples_per_shard, seed=seed)
        self.image_size = image_size
        self.augmentation = augmentation

    def __getitem__(self, position: int) -> _Item:
        epoch, number = self.order.sample_at(position)
        sample = self.index.sample(number)
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
