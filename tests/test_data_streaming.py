"""Shards without an index: never ending, bounded, and nothing in a shard or a URL is executed."""

from __future__ import annotations

import itertools
import os
import pickle
import time
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import pytest
from fsspec.registry import _registry
from fsspec.spec import AbstractFileSystem

from tests.bad_members import make_faults
from tests.tars import write_tar
from tests.test_data_bad import LIMITS, PHOTOS, SKIP, write_shards_with
from vqrae_ds.data import streaming
from vqrae_ds.data.crops import Augmentation
from vqrae_ds.data.decode import Decoding
from vqrae_ds.data.faults import REFUSE, BadSample, Policy
from vqrae_ds.data.loader import Batch
from vqrae_ds.data.remote import check_url
from vqrae_ds.data.shard_writing import find_images
from vqrae_ds.data.streaming import Stream, streamed_batches


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of one usable oddity and six photographs each."""
    folder = tmp_path_factory.mktemp("shards")
    usable = [fault for fault in make_faults(folder / "executed") if fault.kind is None]
    write_shards_with(folder, usable, sound_each=6)
    return folder


def shards_of(folder: Path) -> list[str]:
    return [str(path) for path in sorted(folder.glob("*.tar"))]


def read(shards: list[str], num_batches: int, rank: int = 0, **changes: object) -> list[Batch]:
    settings = dict(image_size=16, micro_batch_size=4, world_size=2, seed=0, start=0)
    settings |= dict(shuffle_samples=8, decoding=Decoding(limits=LIMITS), policy=SKIP)
    workers = {"num_workers": changes.pop("num_workers", 0), "prefetch_batches": 2}
    augmentation = Augmentation(0.5, 1.0, horizontal_flip=True)
    stream = Stream(shards, augmentation=augmentation, **settings | changes)
    return list(itertools.islice(streamed_batches(stream, rank, **workers), num_batches))


def keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_all_ranks_get_full_batches_for_ever(folder: Path, num_workers: int) -> None:
    shards = shards_of(folder)
    for rank in (0, 1):
        batches = read(shards, 40, rank, num_workers=num_workers)
        assert len(batches) == 40, "more than the shards hold"
        assert all(batch.images_B3HW.shape == (4, 3, 16, 16) for batch in batches)
        assert not any(batch.skipped for batch in batches)
    assert len(set(keys(batches))) > 30, "from all over the shards"


def test_ranks_seeds_and_starts_draw_differently_and_the_same_ones_alike(folder: Path) -> None:
    shards = shards_of(folder)
    drawn = [
        keys(read(shards, 5, rank, seed=seed, start=start))
        for rank, seed, start in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 40)]
    ]
    assert len({tuple(order) for order in drawn}) == 4
    assert keys(read(shards, 5)) == drawn[0]


def test_files_are_read_by_url_too(folder: Path) -> None:
    urls = [Path(path).as_uri() for path in shards_of(folder)]
    assert keys(read(urls, 5)) == keys(read(shards_of(folder), 5))


@pytest.mark.parametrize(
    "url",
    ["pipe:touch {0}", "pipe:cat /etc/passwd", "http://host/0.tar", "zip://a::s3://b", "py:os"],
)
def test_a_url_that_could_run_something_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(ValueError, match="is refused: give a local path, or a URL of file, https"):
        read([url.format(tmp_path / "executed")], 1)
    assert not (tmp_path / "executed").exists()
    for sound in ("s3://bucket/0.tar", "https://host/0.tar", "gs://b/0.tar", "a/0.tar", "/a/0.tar"):
        check_url(sound)


def test_faults_are_counted_and_what_is_cut_is_noticed(tmp_path: Path) -> None:
    payload = tmp_path / "executed"
    faults = make_faults(payload)
    write_shards_with(tmp_path / "shards", faults)
    shards = shards_of(tmp_path / "shards")
    os.truncate(shards[0], 7000)
    damaged = bytearray(Path(shards[1]).read_bytes())
    damaged[3] ^= 1
    Path(shards[1]).write_bytes(damaged)
    Path(shards[2]).unlink()
    batches = read(shards, 150)
    found = Counter(skipped.kind for batch in batches for skipped in batch.skipped)
    expected = {fault.kind for fault in faults[3:] if fault.kind} - {"empty"}
    assert set(found) - {"empty"} == expected | {"cut_shard", "damaged_shard", "missing_shard"}
    assert not payload.exists()
    with pytest.raises(BadSample, match="00002.tar: the shard cannot be read"):
        read([shards[2]], 1, policy=REFUSE)
    with pytest.raises(BadSample, match="32 shards in a row gave no sample; the last: .*00001.tar"):
        read([shards[1]], 1)


def write_bad(path: Path, num_bad: int, *, sound: bool) -> str:
    """A shard of empty images, and a photograph behind them."""
    members = [(f"{number:05d}.jpg", b"") for number in range(num_bad)]
    if sound:
        members.append(("sound.webp", find_images(PHOTOS / "val")[0].read_bytes()))
    return str(write_tar(path, members))


@pytest.mark.timeout(120)
def test_a_row_of_nothing_but_bad_images_comes_to_an_end(tmp_path: Path) -> None:
    shard = write_bad(tmp_path / "0.tar", 3000, sound=False)
    with pytest.raises(BadSample, match="10000 samples in a row cannot be used; the last: .*0.tar"):
        read([shard], 1)


def test_of_many_faults_a_few_are_told_and_all_are_counted(tmp_path: Path) -> None:
    shard = write_bad(tmp_path / "0.tar", 500, sound=True)
    (batch,) = read([shard], 1, shuffle_samples=1)
    assert batch.keys == ["sound"] * 4
    assert Counter(skipped.kind for skipped in batch.skipped) == {"empty": 4 * 500}
    told = [message for _, message in batch.skipped if message]
    assert len(told) == 4 * 3 and all("0.tar, sample '" in message for message in told)
    assert len(pickle.dumps(batch.skipped)) < 20_000, "what a loader process sends"


class ServerError(Exception):
    """As a client of a store has it: no `OSError`."""


class Store(AbstractFileSystem):
    """A bucket that is a folder, behind a server that fails at given requests."""

    cachable = False
    folder: Path
    broken: frozenset[int]  # numbers of requests, from 0
    times: list[float]

    def _open(self, path: str, mode: str = "rb", **_: object) -> BinaryIO:
        return _Request((self.folder / path.removeprefix("s3://").partition("/")[2]).open(mode))


class _Request:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._answer()

    def read(self, count: int) -> bytes:
        self._answer()
        return self._file.read(count)

    def _answer(self) -> None:
        number = len(Store.times)
        Store.times.append(time.monotonic())
        if number in Store.broken:
            raise ServerError("500")

    def close(self) -> None:
        self._file.close()
        raise ServerError("closed already")


@pytest.fixture
def bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(_registry, "s3", Store)
    monkeypatch.setattr(Store, "folder", folder, raising=False)
    monkeypatch.setattr(Store, "broken", frozenset(), raising=False)
    monkeypatch.setattr(Store, "times", [], raising=False)
    return [f"s3://bucket/{Path(path).name}" for path in shards_of(folder)]


def test_a_store_that_fails_for_a_while_is_waited_for(
    bucket: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = read(bucket, 3)
    assert not any(batch.skipped for batch in whole)
    Store.times.clear()
    monkeypatch.setattr(Store, "broken", frozenset({0, 1, 3, 4}))  # 2 opens, 3 is its first read
    batches = read(bucket, 3)
    assert all(len(batch.keys) == 4 for batch in batches)
    found = [skipped for batch in batches for skipped in batch.skipped]
    assert [kind for kind, _ in found] == ["unreadable"] * 4
    assert "s3://bucket/" in found[0].message and "ServerError: 500" in found[0].message
    first, second, opened, reading, third, last, *_ = Store.times
    assert reading == Store.times[3] and opened < reading
    gaps = [second - first, opened - second, third - reading, last - third]
    assert all(gap >= 0.1 * 2**n for n, gap in enumerate(gaps)), gaps
    with pytest.raises(BadSample, match=r"s3://bucket/.*ServerError: 500"):
        monkeypatch.setattr(Store, "broken", frozenset(range(len(Store.times), 1 << 20)))
        read(bucket, 1, policy=REFUSE)


def test_a_store_that_stays_away_ends_the_run(
    bucket: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Store, "broken", frozenset(range(1 << 10)))
    monkeypatch.setattr(streaming, "LONGEST_PAUSE", 0.001)
    with pytest.raises(BadSample, match="32 shards in a row gave no sample; the last: s3://bucket"):
        read(bucket, 1)
    assert len(Store.times) == 32


def test_ranks_that_read_the_same_shards_do_not_pass_over_what_one_of_them_lacks(
    folder: Path, tmp_path: Path
) -> None:
    gone = str(tmp_path / "gone.tar")
    twin = Policy(skip=True, has_twins=True)
    with pytest.raises(BadSample, match="gone.tar: the shard cannot be read"):
        read([gone], 1, policy=twin)
    shard = write_bad(tmp_path / "0.tar", 5, sound=True)
    (batch,) = read([shard], 1, policy=twin, shuffle_samples=1)
    assert len(batch.skipped) == 20, "what is bad for all of them is skipped"


def test_what_is_held_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "MAX_HELD_BYTES", 100_000)
    held = read(shards_of(folder), 5, shuffle_samples=10**9)
    assert len(held) == 5, "it would never end if it waited for so many samples"
