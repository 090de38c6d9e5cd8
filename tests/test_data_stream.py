"""The stream: each sample once an epoch, the same order for every world, and exact resume."""

from __future__ import annotations

import atexit
import io
import itertools
import pickle
import shutil
import tempfile
from collections import Counter
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.tars import write_tar
from vqrae_ds.data.crops import Augmentation, centre_crop
from vqrae_ds.data.decode import decode_sample
from vqrae_ds.data.index import ShardIndex
from vqrae_ds.data.indexing import index_shards
from vqrae_ds.data.loader import Batch
from vqrae_ds.data.order import SampleOrder, micro_batch_positions
from vqrae_ds.data.shard_writing import find_images, write_shards
from vqrae_ds.data.stream import evaluation_batches, training_batches

PHOTOS = Path(__file__).parent / "data" / "photos"
AUGMENTATION = Augmentation(0.3, 1.0, horizontal_flip=True)
SHARD_SIZES = [5, 0, 7, 1, 12, 6]
NUM_SAMPLES = sum(SHARD_SIZES)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> ShardIndex:
    """Eight photographs in three shards."""
    folder = tmp_path_factory.mktemp("photos")
    images = find_images(PHOTOS / "val")
    return write_shards(images, folder / "shards", samples_per_shard=3, root=PHOTOS)


def read(index: ShardIndex, num_batches: int, **changes: object) -> list[Batch]:
    defaults = dict(
        image_size=24, micro_batch_size=2, rank=0, world_size=1, seed=0, start=0, num_workers=0
    )
    batches = training_batches(index, **defaults | changes, augmentation=AUGMENTATION)
    return list(itertools.islice(batches, num_batches))


def assert_same(ours: list[Batch], theirs: list[Batch]) -> None:
    assert [batch.keys for batch in ours] == [batch.keys for batch in theirs]
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a.images_B3HW, b.images_B3HW)


@lru_cache(maxsize=4)
def tiny_shards(sizes: tuple[int, ...]) -> ShardIndex:
    """Shards of so many images of 4 pixels each, all different."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    for s, size in enumerate(sizes):
        members = []
        for i in range(size):
            buffer = io.BytesIO()
            Image.new("RGB", (2, 2), (s, i, 7)).save(buffer, "PNG")
            members.append((f"{s}_{i}.png", buffer.getvalue()))
        write_tar(folder / f"{s}.tar", members)
    return index_shards(folder)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    sizes=st.sampled_from([(5, 0, 7, 1), (3,), (1, 1, 9), (2, 6, 4)]),
    seed=st.integers(0, 2**31),
    world_size=st.integers(1, 8),
    micro_batch=st.integers(1, 3),
    num_workers=st.integers(0, 3),
    later_workers=st.integers(0, 3),
    data=st.data(),
)
def test_batches_of_all_ranks_are_the_epochs_whatever_reads_them(
    sizes: tuple[int, ...],
    seed: int,
    world_size: int,
    micro_batch: int,
    num_workers: int,
    later_workers: int,
    data: st.DataObject,
) -> None:
    index = tiny_shards(sizes)
    steps = -(-index.num_samples // (world_size * micro_batch)) + 1
    killed_after = data.draw(st.integers(0, steps), label="killed after")
    common = dict(seed=seed, world_size=world_size, micro_batch_size=micro_batch, image_size=2)
    ranks = []
    for rank in range(world_size):
        before = read(index, killed_after, rank=rank, num_workers=num_workers, **common)
        start = killed_after * world_size * micro_batch
        rest = dict(rank=rank, num_workers=later_workers, start=start)
        ranks.append(before + read(index, steps - killed_after, **rest, **common))
        assert_same(ranks[-1], read(index, steps, rank=rank, **common))
    keys = [key for step in zip(*ranks, strict=True) for batch in step for key in batch.keys]
    epoch = [index.sample(i).key for i in range(index.num_samples)]
    for first in range(0, len(keys) - len(epoch) + 1, len(epoch)):
        assert sorted(keys[first : first + len(epoch)]) == sorted(epoch)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 4])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("start", [0, 17])
def test_each_sample_comes_once_an_epoch(
    world_size: int, micro_batch_size: int, start: int
) -> None:
    num_steps = -(-4 * NUM_SAMPLES // (world_size * micro_batch_size))
    taken = []
    for rank in range(world_size):
        positions = micro_batch_positions(
            micro_batch_size=micro_batch_size, rank=rank, world_size=world_size, start=start
        )
        taken += itertools.chain.from_iterable(itertools.islice(positions, num_steps))
    # No position twice, none left out ...
    assert sorted(taken) == list(range(start, start + num_steps * world_size * micro_batch_size))
    # ... so that each full epoch among them has each sample once.
    order = SampleOrder(SHARD_SIZES, seed=3)
    count = Counter(order.sample_at(position) for position in taken)
    for epoch in (1, 2, 3):
        assert [count[epoch, i] for i in range(NUM_SAMPLES)] == [1] * NUM_SAMPLES


@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 3), (2, 2), (3, 1), (4, 3)])
def test_the_order_does_not_depend_on_the_world(
    photos: ShardIndex, world_size: int, micro_batch_size: int
) -> None:
    order = SampleOrder(photos.samples_per_shard, seed=0)
    expected = [photos.sample(order.sample_at(position).sample).key for position in range(24)]
    num_steps = 24 // (world_size * micro_batch_size)
    ranks = [
        read(photos, num_steps, rank=r, world_size=world_size, micro_batch_size=micro_batch_size)
        for r in range(world_size)
    ]
    keys = [key for step in zip(*ranks, strict=True) for batch in step for key in batch.keys]
    assert keys == expected


def test_resume_at_any_position_is_the_uninterrupted_run(photos: ShardIndex) -> None:
    whole = read(photos, 20, micro_batch_size=1)
    assert whole[0].images_B3HW.shape == (1, 3, 24, 24)
    for start in range(18):
        assert_same(read(photos, 2, micro_batch_size=1, start=start), whole[start : start + 2])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resume_of_two_ranks_with_and_without_workers(photos: ShardIndex, num_workers: int) -> None:
    for rank in (0, 1):
        common = dict(rank=rank, world_size=2, micro_batch_size=3, num_workers=num_workers)
        whole = read(photos, 5, rank=rank, world_size=2, micro_batch_size=3)
        assert_same(read(photos, 5, **common), whole)
        assert_same(read(photos, 3, **common, start=2 * 2 * 3), whole[2:])


def test_resume_with_another_world_goes_on_with_the_same_images(photos: ShardIndex) -> None:
    whole = read(photos, 24, micro_batch_size=1)
    later = [read(photos, 2, rank=r, world_size=2, micro_batch_size=3, start=7) for r in (0, 1)]
    images = [image for step in zip(*later, strict=True) for b in step for image in b.images_B3HW]
    assert torch.equal(torch.stack(images), torch.cat([b.images_B3HW for b in whole[7:19]]))


def test_seeds_and_epochs_differ_in_order_and_in_crops(photos: ShardIndex) -> None:
    def epochs(seed: int) -> tuple[tuple[int, ...], ...]:
        order = SampleOrder(SHARD_SIZES, seed=seed)
        numbers = [order.sample_at(position).sample for position in range(3 * NUM_SAMPLES)]
        return tuple(tuple(numbers[e * NUM_SAMPLES :][:NUM_SAMPLES]) for e in range(3))

    assert len({*epochs(0), *epochs(1), *epochs(-1)}) == 9
    assert epochs(0) == epochs(0)

    by_key = [
        dict(zip(batch.keys, batch.images_B3HW, strict=True))
        for seed in (0, 1)
        for batch in read(photos, 2, micro_batch_size=8, seed=seed)
    ]
    for one, other in itertools.combinations(by_key, 2):
        assert one.keys() == other.keys()
        assert not any(torch.equal(one[key], other[key]) for key in one)


def test_shards_and_samples_are_shuffled_and_a_shard_is_read_in_one_go() -> None:
    order = SampleOrder([50] * 40, seed=0)
    numbers = np.array([order.sample_at(position).sample for position in range(2000)])
    shards = numbers.reshape(40, 50) // 50
    assert (shards == shards[:, :1]).all()
    turns = shards[:, 0]
    assert sorted(turns) == list(range(40))
    within = numbers.reshape(40, 50) % 50
    for sequence in (turns, *within):  # a shuffled order keeps few of its pairs together
        assert np.sum(np.diff(sequence) == 1) < 8
    assert len({tuple(samples) for samples in within}) == 40


def test_the_order_is_pinned() -> None:
    """A run that resumes under another version of numpy or torch must go on in the same order."""
    order = SampleOrder([3, 4, 3], seed=7)
    assert [order.sample_at(position).sample for position in range(20)] == [
        9,
        8,
        7,
        3,
        4,
        5,
        6,
        1,
        2,
        0,
        9,
        7,
        8,
        2,
        1,
        0,
        3,
        5,
        6,
        4,
    ]


def test_a_far_position_costs_no_replay() -> None:
    order = SampleOrder(SHARD_SIZES, seed=0)
    far = 10**15
    places = [order.sample_at(position) for position in range(far, far + 2 * NUM_SAMPLES)]
    assert places[0].epoch == far // NUM_SAMPLES
    next_epoch = [place.sample for place in places if place.epoch == places[0].epoch + 1]
    assert sorted(next_epoch) == list(range(NUM_SAMPLES))
    assert order.sample_at(3) == SampleOrder(SHARD_SIZES, seed=0).sample_at(3)


def test_the_index_travels_to_workers(photos: ShardIndex) -> None:
    order = SampleOrder(photos.samples_per_shard, seed=1)
    assert pickle.loads(pickle.dumps(order)).sample_at(11) == order.sample_at(11)
    assert pickle.loads(pickle.dumps(photos)).sample(5) == photos.sample(5)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_reading_leaves_the_global_random_state_alone(photos: ShardIndex, num_workers: int) -> None:
    before = torch.get_rng_state()
    read(photos, 2, num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_named(tmp_path: Path, num_workers: int) -> None:
    good = find_images(PHOTOS / "val")[0].read_bytes()
    for name, data in {"a": good, "b": good[:2000], "c": good}.items():
        (tmp_path / f"{name}.webp").write_bytes(data)
    images = find_images(tmp_path)
    index = write_shards(images, tmp_path / "out", samples_per_shard=9, root=tmp_path)
    with pytest.raises(ValueError, match=r"000000\.tar, sample 'b': cannot decode"):
        read(index, 2, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"000000\.tar, sample 'b': cannot decode"):
        list(evaluation_batches(index, image_size=8, batch_size=1, rank=0, world_size=1))


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (1, 3), (2, 3), (3, 2), (4, 5)])
def test_evaluation_sees_each_sample_once_in_equal_batches(
    photos: ShardIndex, world_size: int, batch_size: int
) -> None:
    ranks = [
        list(
            evaluation_batches(
                photos, image_size=16, batch_size=batch_size, rank=rank, world_size=world_size
            )
        )
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    assert len(ranks[0]) == -(-8 // (batch_size * world_size))
    numbers = {photos.sample(i).key: i for i in range(8)}
    seen = []
    for batch in itertools.chain.from_iterable(zip(*ranks, strict=True)):
        assert batch.images_B3HW.shape == (batch_size, 3, 16, 16)
        assert batch.is_real_B.shape == (batch_size,) and batch.is_real_B.dtype == torch.bool
        for image, is_real, key, number in zip(*batch, strict=True):
            sample = photos.sample(numbers[key])
            assert torch.equal(image, decode_sample(sample, centre_crop, image_size=16))
            assert is_real == (number < 8) and number % 8 == numbers[key]
            seen += [key] if is_real else []
    assert seen == list(numbers)


def test_an_order_read_from_disk_is_the_order_as_written(photos: ShardIndex) -> None:
    again = index_shards(photos.shards[0].folder)
    for position in range(24):
        one, other = (
            SampleOrder(index.samples_per_shard, seed=5).sample_at(position)
            for index in (photos, again)
        )
        assert one == other and photos.sample(one.sample) == again.sample(other.sample)
