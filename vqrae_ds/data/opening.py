"""From the data section of a configuration to what a run reads: an index, and batches of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vqrae_ds.config import DataConfig
from vqrae_ds.config.data_paths import expand_folders, expand_paths
from vqrae_ds.data.crops import Augmentation
from vqrae_ds.data.decode import Decoding
from vqrae_ds.data.faults import Policy
from vqrae_ds.data.image_header import Limits
from vqrae_ds.data.index import RETOUCHED_SHARD, ShardIndex, merge, read_index, shard_faults
from vqrae_ds.data.loader import Batch
from vqrae_ds.data.stream import EvaluationBatch, evaluation_batches, training_batches
from vqrae_ds.data.streaming import Stream, streamed_batches

if TYPE_CHECKING:
    from vqrae_ds.parallel.groups import Ranks

logger = logging.getLogger(__name__)

# Up to so many every rank looks at all of them; of more, each at its share: their file server has
# to answer for all ranks at once.
MANY_SHARDS = 2000
_SHOWN_FAULTS = 3


class Reader(NamedTuple):
    """Who reads: one of `world_size` ranks that see different images, or groups of such.

    With `has_twins` it is one of a group that see the same images, and read them each for itself.
    """

    rank: int
    world_size: int
    has_twins: bool = False

    @classmethod
    def of(cls, ranks: Ranks) -> Reader:
        """This process among the ranks of a training."""
        return cls(ranks.data_rank, ranks.data_size, ranks.tensor_size > 1)


def open_index(
    named: str | Sequence[str], data: DataConfig, reader: Reader, *, setting: str = "data.train"
) -> ShardIndex:
    """The index of all folders that `setting` names, as one data set.

    Raises `ValueError` where an index is missing or damaged, and where a shard that this rank looks
    at is not as it was indexed; with `data.bad_samples: skip` that is a warning. So is always one
    that has the size but not the time that it had: a copy may have another.
    """
    folders = [Path(path) for path in expand_folders(setting, named)]
    index = merge([read_index(folder, check_shards=False) for folder in folders])
    shards = index.shards
    if len(shards) > MANY_SHARDS:
        shards = shards[reader.rank :: reader.world_size]
    faults, retouched = [], []
    for fault in shard_faults(shards):
        if fault.kind == RETOUCHED_SHARD:
            retouched.append(fault.message)
        elif data.bad_samples == "refuse":
            raise ValueError(fault.message)
        else:
            faults.append(fault.message)
    for message in (*faults[:_SHOWN_FAULTS], *retouched[:1]):
        logger.warning("%s", message)
    if faults:
        logger.warning("%d of %d shards are missing or changed", len(faults), len(shards))
    if retouched:
        logger.warning("%d of %d shards have another time", len(retouched), len(shards))
    return index


def check_same_data(index: ShardIndex, saved: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a run went through another data set: its place means nothing here.

    `saved` is what its checkpoint keeps, which may be the number of samples alone.
    """
    before = saved.get("num_samples", index.num_samples)
    if before != index.num_samples:
        raise ValueError(
            f"data.train has {index.num_samples} samples, and the run went through a set of "
            f"{before}: give that one, or start a new run with init.from_run"
        )
    if saved.get("data_digest", index.digest()) != index.digest():
        raise ValueError(
            f"data.train has the {before} samples of the set that the run went through in other "
            "shards, or in another order: give that set, or start a new run with init.from_run"
        )


def decoding_of(data: DataConfig) -> Decoding:
    """How the images of a run are decoded."""
    limits = Limits(num_bytes=data.max_image_bytes, pixels=data.max_image_pixels)
    return Decoding(data.decode, limits)


def open_training(
    data: DataConfig,
    index: ShardIndex | None,
    reader: Reader,
    *,
    image_size: int,
    micro_batch_size: int,
    seed: int,
    start: int,
) -> Iterator[Batch]:
    """The endless micro batches of one rank, from the sample `start` of the stream on.

    Without an `index` the shards of `data.train` are streamed.
    """
    augmentation = Augmentation(
        crop_scale_min=data.crop_scale_min,
        crop_scale_max=data.crop_scale_max,
        horizontal_flip=data.horizontal_flip,
    )
    if index is None:
        stream = Stream(
            shards=expand_paths("data.train", data.train),
            image_size=image_size,
            micro_batch_size=micro_batch_size,
            world_size=reader.world_size,
            seed=seed,
            start=start,
            shuffle_samples=data.streaming.shuffle_samples,
            augmentation=augmentation,
            decoding=decoding_of(data),
            policy=_policy(data, reader),
        )
        loading = {"num_workers": data.num_workers, "prefetch_batches": data.prefetch_batches}
        return streamed_batches(stream, reader.rank, **loading)
    return training_batches(
        index,
        image_size=image_size,
        micro_batch_size=micro_batch_size,
        rank=reader.rank,
        world_size=reader.world_size,
        seed=seed,
        start=start,
        num_workers=data.num_workers,
        augmentation=augmentation,
        decoding=decoding_of(data),
        policy=_policy(data, reader),
        prefetch_batches=data.prefetch_batches,
    )


def open_evaluation(
    index: ShardIndex, data: DataConfig, reader: Reader, *, image_size: int, batch_size: int
) -> Iterator[EvaluationBatch]:
    """One pass over a validation set for one rank, decoded exactly whatever the training does."""
    return evaluation_batches(
        index,
        image_size=image_size,
        batch_size=batch_size,
        rank=reader.rank,
        world_size=reader.world_size,
        decoding=decoding_of(data)._replace(mode="exact"),
        policy=_policy(data, reader),
    )


def _policy(data: DataConfig, reader: Reader) -> Policy:
    return Policy(data.bad_samples == "skip", reader.has_twins)
