"""Shards without an index: never ending, bounded, and nothing in a shard or a URL is executed."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.bad_members import make_faults
from tests.test_data_bad import LIMITS, write_shards_with
from vqrae_ds.data import streaming
from vqrae_ds.data.crops import Augmentation
from vqrae_ds.data.decode import Decoding
from vqrae_ds.data.faults import BadSample
from vqrae_ds.data.loader import Batch
from vqrae_ds.data.streaming import Stream, check_url, streamed_batches


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
    settings |= dict(shuffle_samples=8, decoding=Decoding(limits=LIMITS), skip_bad=True)
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
        read([shards[2]], 1, skip_bad=False)
    with pytest.raises(BadSample, match="32 shards in a row gave no sample; the last: .*00001.tar"):
        read([shards[1]], 1)


def test_what_is_held_is_bounded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "MAX_HELD_BYTES", 100_000)
    held = read(shards_of(folder), 5, shuffle_samples=10**9)
    assert len(held) == 5, "it would never end if it waited for so many samples"
