"""Bad data: no crash, nothing executed, memory bounded, every lost sample noticed and counted."""

from __future__ import annotations

import io
import itertools
import os
import random
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.bad_members import Fault, make_faults
from tests.distributed import run_ranks
from tests.memory import sampled_memory
from tests.tars import write_tar
from vqrae_ds.data import reading
from vqrae_ds.data.bad_data import FEWEST_SAMPLES, BadData
from vqrae_ds.data.crops import Augmentation, centre_crop
from vqrae_ds.data.decode import Decoding, decode_crop
from vqrae_ds.data.failure import DataFailed, naming_rank
from vqrae_ds.data.faults import KINDS, REFUSE, BadSample, Policy, Skipped
from vqrae_ds.data.image_header import Limits
from vqrae_ds.data.index import SAMPLES_NAME, ShardIndex, _samples, merge, read_index
from vqrae_ds.data.indexing import index_shards
from vqrae_ds.data.loader import Batch
from vqrae_ds.data.order import SampleOrder
from vqrae_ds.data.reading import read_sample
from vqrae_ds.data.shard_writing import find_images
from vqrae_ds.data.stream import evaluation_batches, training_batches

PHOTOS = Path(__file__).parent / "data" / "photos"
LIMITS = Limits(num_bytes=2 << 20, pixels=20_000_000)
SKIP = Policy(skip=True)
MOST_MEMORY = 300 << 20  # of one image within these limits, and of the libraries' first use


@pytest.fixture(scope="module")
def faults(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Fault]]:
    payload = tmp_path_factory.mktemp("payload") / "executed"
    return payload, make_faults(payload)


def write_shards_with(folder: Path, faults: list[Fault], sound_each: int = 2) -> ShardIndex:
    """Shards of one fault amid sound photographs each."""
    folder.mkdir(exist_ok=True)
    photos = itertools.cycle(path.read_bytes() for path in find_images(PHOTOS / "val"))
    for s, fault in enumerate(faults):
        members = [(f"{s:03d}_{i}.webp", next(photos)) for i in range(sound_each)]
        members.insert(1, (f"{s:03d} {fault.name}.{fault.extension}", fault.data))
        write_tar(folder / f"{s:05d}.tar", members)
    return index_shards(folder)


def read(index: ShardIndex, num_batches: int, **changes: object) -> list[Batch]:
    settings = dict(
        image_size=24, micro_batch_size=3, rank=0, world_size=1, seed=0, start=0, num_workers=0
    )
    settings |= dict(decoding=Decoding(limits=LIMITS), policy=SKIP)
    batches = training_batches(
        index, augmentation=Augmentation(0.3, 1.0, horizontal_flip=True), **settings | changes
    )
    return list(itertools.islice(batches, num_batches))


def test_there_are_enough_kinds(faults) -> None:
    bad = [fault for fault in faults[1] if fault.kind is not None]
    assert len(bad) >= 25 and len({fault.name for fault in bad}) == len(bad)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_each_fault_is_known_by_its_kind_within_bounded_memory(faults, mode: str) -> None:
    payload, every = faults
    photo = find_images(PHOTOS / "val")[0].read_bytes()
    found: dict[str, tuple[str | None, bool]] = {}
    decode_crop(photo, centre_crop, image_size=24)  # libraries have their own first use
    for fault in every:
        peaks: dict[str, int] = {}
        with sampled_memory(peaks):
            try:
                decoding = Decoding(mode, LIMITS)
                decode_crop(fault.data, centre_crop, image_size=24, decoding=decoding)
                kind = None
            except BadSample as error:
                kind = error.kind
        found[fault.name] = kind, peaks["RssAnon"] < MOST_MEMORY
    assert found == {fault.name: (fault.kind, True) for fault in every}
    assert not payload.exists(), "code out of a shard was executed"


@pytest.mark.parametrize(("num_workers", "world_size"), [(0, 1), (2, 1), (0, 3)])
def test_an_epoch_with_every_fault_comes_to_its_end_with_the_right_counts(
    faults, tmp_path: Path, num_workers: int, world_size: int
) -> None:
    payload, every = faults
    index = write_shards_with(tmp_path / "shards", every)
    assert index.num_samples == 3 * len(every)
    batches = [
        batch
        for rank in range(world_size)
        for batch in read(
            index,
            -(-len(every) // world_size),
            rank=rank,
            world_size=world_size,
            num_workers=num_workers,
        )
    ]
    # One epoch, and with three ranks the first samples of the next one.
    order = SampleOrder(index.samples_per_shard, seed=0)
    places = [order.sample_at(position) for position in range(3 * len(batches))]
    expected, by_key = Counter(), {f"{s:03d} {f.name}": f for s, f in enumerate(every)}
    for place in places:
        fault = by_key.get(index.sample(place.sample).key)
        expected.update([fault.kind] if fault is not None and fault.kind is not None else [])
    found = Counter(skipped.kind for batch in batches for skipped in batch.skipped)
    assert found == expected and found.total() >= 25
    for batch in batches:
        assert batch.images_B3HW.shape == (3, 3, 24, 24) and batch.images_B3HW.isfinite().all()
        assert not {by_key[key].kind for key in batch.keys if key in by_key} - {None}
        assert all(".tar, sample " in skipped.message for skipped in batch.skipped)
    assert not payload.exists()


def test_the_same_samples_stand_in_after_a_resume_and_in_another_world(
    faults, tmp_path: Path
) -> None:
    index = write_shards_with(tmp_path / "shards", faults[1][::3])
    whole = read(index, 24, micro_batch_size=1)
    assert sum(len(batch.skipped) for batch in whole) >= 5
    later = [read(index, 3, rank=r, world_size=2, micro_batch_size=3, start=6) for r in (0, 1)]
    again = [batch for step in zip(*later, strict=True) for batch in step]
    assert [key for batch in again for key in batch.keys] == [b.keys[0] for b in whole[6:]]
    images = torch.cat([batch.images_B3HW for batch in again])
    assert torch.equal(images, torch.cat([batch.images_B3HW for batch in whole[6:]]))


def test_shards_that_go_or_change_after_indexing_are_counted(tmp_path: Path, faults) -> None:
    sound = [fault for fault in faults[1] if fault.kind is None][:6]
    index = write_shards_with(tmp_path / "shards", sound)
    paths = [shard.path for shard in index.shards]
    paths[0].unlink()
    os.truncate(paths[1], 2000)
    paths[2].unlink()
    paths[2].mkdir()
    batches = read(index, index.num_samples // 3)
    found = Counter(skipped.kind for batch in batches for skipped in batch.skipped)
    assert found == {"missing_shard": 3, "resized_shard": 6}
    with pytest.raises(BadSample, match="sample .*the shard"):
        read(index, index.num_samples // 3, policy=REFUSE)
    evaluated = list(
        evaluation_batches(index, image_size=24, batch_size=3, rank=0, world_size=1, policy=SKIP)
    )
    assert sum(int(batch.is_real_B.sum()) for batch in evaluated) == index.num_samples - 9


def test_ranks_that_read_the_same_samples_do_not_pass_over_what_one_of_them_lacks(
    tmp_path: Path, faults
) -> None:
    twins = dict(policy=Policy(skip=True, has_twins=True), micro_batch_size=1, rank=0, world_size=1)
    bad = [fault for fault in faults[1] if fault.kind == "corrupt"][:1]
    sound = [fault for fault in faults[1] if fault.kind is None][:3]
    index = write_shards_with(tmp_path / "shards", [*bad, *sound])
    batches = read(index, index.num_samples, **twins)
    kinds = [skipped.kind for batch in batches for skipped in batch.skipped]
    assert kinds == ["corrupt"], "that one is bad for all of them"
    for path, damage in zip(
        [shard.path for shard in index.shards[1:]],
        (Path.unlink, lambda path: os.truncate(path, 2000), into_folder),
        strict=True,
    ):
        whole = path.read_bytes()
        damage(path)
        reading._open.cache_clear()  # what is open goes on to have the bytes
        with pytest.raises(BadSample, match=rf"{path.name}, sample .*: the shard"):
            read(index, index.num_samples, **twins)
        with pytest.raises(BadSample, match=rf"{path.name}, sample .*: the shard"):
            evaluation = dict(image_size=8, batch_size=1, rank=0, world_size=1)
            list(evaluation_batches(index, **evaluation, policy=twins["policy"]))
        if path.is_dir():
            path.rmdir()
        path.write_bytes(whole)


def into_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def test_a_descriptor_that_is_stale_costs_no_sample(tmp_path: Path, faults) -> None:
    """One that leads to a folder gives the error of a read, and the file has another one."""
    index = write_shards_with(tmp_path / "shards", [f for f in faults[1] if f.kind is None][:2])
    sample = index.sample(0)
    data = read_sample(sample, LIMITS.num_bytes)
    stale = os.open(tmp_path, os.O_RDONLY)
    os.dup2(stale, reading._open(sample.shard).descriptor)
    os.close(stale)
    assert read_sample(sample, LIMITS.num_bytes) == data
    replaced = tmp_path / "replaced.tar"  # the open descriptor has a file that is no more
    shutil.copy(sample.shard, replaced)
    os.truncate(sample.shard, 600)
    reading._open.cache_clear()
    with pytest.raises(BadSample, match="the shard has 600 bytes"):
        read_sample(sample, LIMITS.num_bytes)
    replaced.rename(sample.shard)
    assert read_sample(sample, LIMITS.num_bytes) == data


class Moving(type(Path())):
    """A path that leads nowhere when it is first used: the file server has moved on."""

    uses = 0

    def __fspath__(self) -> str:
        Moving.uses += 1
        return super().__fspath__() + ".gone" * (Moving.uses == 1)


def test_a_table_of_samples_that_cannot_be_read_is_under_the_policy(tmp_path: Path, faults) -> None:
    sound = [fault for fault in faults[1] if fault.kind is None][:4]
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        write_shards_with(folder, sound)
    index = merge([read_index(folder) for folder in folders])
    moved = [s._replace(table=s.table._replace(file=Moving(s.table.file))) for s in index.shards]
    _samples.cache_clear()
    assert ShardIndex(moved).sample(0) == index.sample(0) and Moving.uses >= 2

    (folders[1] / SAMPLES_NAME).rename(tmp_path / "kept")
    for cause in (None, Path.mkdir):
        if cause is not None:
            cause(folders[1] / SAMPLES_NAME)
        _samples.cache_clear()
        batches = read(index, 8)
        skipped = [s for batch in batches for s in batch.skipped]
        assert {s.kind for s in skipped} == {"unreadable"}
        assert all(str(folders[1] / SAMPLES_NAME) in s.message for s in skipped)
        evaluation = dict(image_size=24, batch_size=4, rank=0, world_size=1)
        evaluated = list(evaluation_batches(index, **evaluation, policy=SKIP))
        assert sum(int(batch.is_real_B.sum()) for batch in evaluated) == index.num_samples // 2
        with pytest.raises(DataFailed, match=r"rank 5: the table of .* cannot be read: .*index"):
            list(naming_rank(5, iter_with_refusal(index)))


def iter_with_refusal(index: ShardIndex) -> Iterator[Batch]:
    settings = dict(image_size=24, micro_batch_size=1, rank=0, world_size=1, seed=0, start=0)
    augmentation = Augmentation(0.3, 1.0, horizontal_flip=True)
    return training_batches(index, **settings, num_workers=0, augmentation=augmentation)


def test_an_error_of_the_system_names_the_rank() -> None:
    def reading_a_device() -> Iterator[bytes]:
        with open("/proc/self/mem", "rb") as file:
            yield file.read(1)

    with pytest.raises(DataFailed, match="rank 3: .*Input/output error"):
        list(naming_rank(3, reading_a_device()))


def test_a_row_of_nothing_but_bad_samples_is_no_endless_search(tmp_path: Path, faults) -> None:
    index = write_shards_with(tmp_path / "shards", [faults[1][0]] * 3, sound_each=1)
    for shard in index.shards:
        os.truncate(shard.path, 100)
    with pytest.raises(BadSample, match="stand in for one another are all bad; the first: .*tar"):
        read(index, 1)


def test_no_cut_of_a_shard_loses_a_sample_unnoticed(tmp_path: Path) -> None:
    """At every boundary of 512 bytes and at random bytes, before indexing and after it."""
    photos = find_images(PHOTOS)[:10]
    path = tmp_path / "0.tar"
    write_tar(path, ((f"{n:03d}.webp", photo.read_bytes()) for n, photo in enumerate(photos)))
    whole, index = path.read_bytes(), index_shards(tmp_path)
    table = index.samples_of(0)
    ends = (table.offsets + table.lengths).tolist()
    end_of_archive = -(-ends[-1] // 512) * 512 + 1024
    boundaries = list(range(0, len(whole), 512))
    assert len(boundaries) > 538
    chosen = random.Random(0).sample(range(len(whole)), 200)
    for cut in [*boundaries, *chosen]:
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"0\.tar has .* bytes, the index says"):
            read_index(tmp_path)
        if cut in boundaries[::8]:  # what is read without that check has the right size or is bad
            kinds = [s.kind for batch in read_all(index, cut) for s in batch.skipped]
            assert len(kinds) == 10 and set(kinds) == {"resized_shard"}
        anew = tmp_path / "anew"
        anew.mkdir(exist_ok=True)
        (anew / "0.tar").write_bytes(whole[:cut])
        if cut >= end_of_archive:  # padding alone is gone
            assert index_shards(anew).num_samples == 10
        else:
            with pytest.raises(ValueError, match=r"0\.tar is not a sound shard"):
                index_shards(anew)
            if any(end <= cut for end in ends):
                salvaged = index_shards(anew, skip_bad=True)
                assert salvaged.num_samples == sum(end <= cut for end in ends)
                assert salvaged.shards[0].left_out == {"cut_shard": 1}
        shutil.rmtree(anew)


def read_all(index: ShardIndex, seed: int) -> list[Batch]:
    """All places of an epoch, where no sample is left to stand in: each is asked for itself."""
    order, batches = SampleOrder(index.samples_per_shard, seed=seed), []
    for position in range(index.num_samples):
        with pytest.raises(BadSample) as refused:
            read(index, 1, micro_batch_size=1, start=position, seed=seed, policy=REFUSE)
        key = index.sample(order.sample_at(position).sample).key
        batches.append(Batch(torch.empty(0), [key], [Skipped(refused.value.kind, key)]))
    return batches


def test_a_share_above_the_limit_is_a_reason_to_stop() -> None:
    bad = BadData(max_share=0.01)
    assert bad.learn(torch.tensor([FEWEST_SAMPLES / 2, *[0.0] * len(KINDS)])) == {}
    counts = torch.tensor([1600.0, *[1.0] * len(KINDS)])
    bad._log_first = lambda kinds: None  # no peers here; the ranks below log for real
    figures = bad.learn(counts)
    assert figures["data/skipped"] == len(KINDS) and figures["data/corrupt"] == 1
    assert not bad.must_stop(), "13 of 2100 are below 1 %"
    bad.learn(torch.tensor([10.0, *[1.0] * len(KINDS)]))
    assert bad.must_stop() and "26 of the last 2110" in bad.reason()


def count_on_ranks(rank: int) -> None:
    bad = BadData(max_share=0.01, state={"empty": 5})
    records: list[str] = []
    from vqrae_ds.data import bad_data

    bad_data.logger.warning = lambda text, *args: records.append(text % args)
    skipped = [Skipped("corrupt", "0.tar, sample 'a': cut")] if rank == 1 else []
    skipped += [Skipped("empty", "known before")]
    bad.add(8, skipped)
    sums = bad.counts()
    dist.all_reduce(sums)
    figures = bad.learn(sums)
    assert figures == {"data/skipped": 8.0, "data/empty": 7.0, "data/corrupt": 1.0}
    assert records == ["skipped, first of its kind (corrupt): 0.tar, sample 'a': cut"], (
        "said on every rank, so that rank 0 says it"
    )
    bad.add(8, [Skipped("corrupt", "x")])
    assert bad.agree() == {"empty": 7, "corrupt": 3}
    others = BadData(max_share=0.01, sees_its_own=rank == 0)
    others.add(4, [Skipped("corrupt", "y")])
    assert others.agree() == {"corrupt": 1}, "a group that sees the same images counts once"
    for _ in range(100):
        bad.add(1, [Skipped("corrupt", "x")])
    bad.agree()
    assert not bad.must_stop(), "a save is no moment to stop"
    bad.learn(torch.zeros(1 + len(KINDS)))
    assert bad.must_stop()


def test_ranks_count_together_and_stop_together() -> None:
    run_ranks(2, count_on_ranks)


def test_keys_never_become_paths(tmp_path: Path) -> None:
    photo = find_images(PHOTOS / "val")[0].read_bytes()
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for name in ("../../escaped.webp", "/tmp/absolute.webp", "a/../../b.webp"):
        member = tarfile.TarInfo(name)
        member.size = len(photo)
        with tarfile.open(tmp_path / "in" / "deep" / "0.tar", "a") as tar:
            tar.addfile(member, io.BytesIO(photo))
    before = sorted(tmp_path.rglob("*"))
    index = index_shards(tmp_path / "in" / "deep")
    keys = {key for batch in read(index, 1) for key in batch.keys}
    assert keys == {"../../escaped", "/tmp/absolute", "a/../../b"}
    made = set(tmp_path.rglob("*")) - set(before)
    assert {path.name for path in made} == {"index.json", "index.samples"}
