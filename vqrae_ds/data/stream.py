"""Batches of indexed images, in the order of `order`: endless for training, one pass to evaluate.

A run resumes at once from ONE integer, the samples consumed by all ranks together, with any number
of ranks and workers and any micro batch size. All ranks take equal steps: an epoch's end is nothing
special to a batch. A sample that cannot be used is refused, or another one stands in for it, the
same one whoever reads it.
Suffixes: B samples, 3 channels, H height, W width.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from vqrae_ds.data.crops import Augmentation, SampleSeed, centre_crop, random_crop
from vqrae_ds.data.decode import EXACT, Decoding, decode_sample
from vqrae_ds.data.faults import REFUSE, BadSample, Policy, Skipped
from vqrae_ds.data.index import ShardIndex
from vqrae_ds.data.loader import Batch, Item, load
from vqrae_ds.data.order import SampleOrder, micro_batch_positions

logger = logging.getLogger(__name__)

ATTEMPTS = 32  # samples that are tried for one place: with every tenth bad, all of them never are


class EvaluationBatch(NamedTuple):
    """A batch of one pass over the data.

    Where `is_real_B` is False, a repeat fills it up, or the sample could not be used; its key is
    empty where nobody knows it. `numbers_B` are the places in the index, counted on behind its end.
    """

    images_B3HW: torch.Tensor  # float32 in [0, 1]
    is_real_B: torch.Tensor  # bool
    keys: list[str]
    numbers_B: torch.Tensor  # int64


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
    decoding: Decoding = EXACT,
    policy: Policy = REFUSE,
    prefetch_batches: int = 2,
) -> Iterator[Batch]:
    """Endless micro batches (B, 3, image_size, image_size) of one rank, B = `micro_batch_size`.

    `start` is the number of samples that all ranks together have consumed: to resume is to pass it.
    Raises `BadSample` naming shard and key at an image that cannot be used; where `policy` skips it
    only if a whole row of them stands in for one another.
    """
    assert 0 <= rank < world_size and micro_batch_size > 0 and start >= 0
    positions = micro_batch_positions(
        micro_batch_size=micro_batch_size, rank=rank, world_size=world_size, start=start
    )
    samples = _TrainingSet(index, image_size, augmentation, decoding, policy, seed)
    return load(samples, positions, num_workers, prefetch_batches)


def evaluation_batches(
    index: ShardIndex,
    *,
    image_size: int,
    batch_size: int,
    rank: int,
    world_size: int,
    decoding: Decoding = EXACT,
    policy: Policy = REFUSE,
) -> Iterator[EvaluationBatch]:
    """One pass in index order, in batches (B, 3, image_size, image_size) with B = `batch_size`.

    Every rank gets the same number of full batches; their real samples are the data set, each once.
    Raises `BadSample` naming shard and key at an image that cannot be used; where `policy` skips it
    it is black, and not real.
    """
    assert 0 <= rank < world_size and batch_size > 0
    for first in range(0, index.num_samples, batch_size * world_size):
        numbers = range(first + rank * batch_size, first + (rank + 1) * batch_size)
        images, keys = [], []
        is_real = [number < index.num_samples for number in numbers]
        for place, number in enumerate(numbers):
            image, key = torch.zeros(3, image_size, image_size), ""
            try:
                sample = index.sample(number % index.num_samples)
                key = sample.key
                image = decode_sample(sample, centre_crop, image_size=image_size, decoding=decoding)
            except BadSample as error:
                if not policy.skips(error.kind):
                    raise
                logger.warning("left out of the evaluation: %s", error)
                is_real[place] = False
            images.append(image)
            keys.append(key)
        numbers_B = torch.tensor(numbers)
        yield EvaluationBatch(torch.stack(images), torch.tensor(is_real), keys, numbers_B)


class _TrainingSet(Dataset):
    """Augmented images by their position in the stream."""

    def __init__(
        self,
        index: ShardIndex,
        image_size: int,
        augmentation: Augmentation,
        decoding: Decoding,
        policy: Policy,
        seed: int,
    ) -> None:
        self.index, self.order = index, SampleOrder(index.samples_per_shard, seed=seed)
        self.image_size, self.augmentation = image_size, augmentation
        self.decoding, self.policy = decoding, policy

    def __getitem__(self, position: int) -> Item:
        place = self.order.sample_at(position)
        crop_seed = SampleSeed(self.order.seed, *place)
        choose_crop = partial(random_crop, augmentation=self.augmentation, seed=crop_seed)
        number, skipped = place.sample, ()
        for attempt in range(ATTEMPTS):
            try:
                sample = self.index.sample(number)
                image = decode_sample(
                    sample, choose_crop, image_size=self.image_size, decoding=self.decoding
                )
                return Item(image, sample.key, skipped)
            except BadSample as error:
                if not self.policy.skips(error.kind):
                    raise
                skipped = skipped or (Skipped(error.kind, str(error)),)
            number = self.order.replacement(place, attempt)
        message = f"{ATTEMPTS} samples that were to stand in for one another are all bad"
        raise BadSample(f"{message}; the first: {skipped[0].message}", skipped[0].kind)
