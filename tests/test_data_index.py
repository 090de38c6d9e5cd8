"""The shard index: what it lists, what it refuses, and that no lost sample goes unnoticed."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tars import write_tar, write_two_shards
from vqrae_ds.config import DataConfig
from vqrae_ds.data.index import (
    INDEX_NAME,
    SAMPLES_NAME,
    ShardIndex,
    _samples,
    merge,
    read_index,
)
from vqrae_ds.data.indexing import index_shards
from vqrae_ds.data.opening import Reader, check_same_data, open_index
from vqrae_ds.data.sample_table import IMAGE_EXTENSIONS, decode_samples, encode_samples
from vqrae_ds.data.shard_writing import find_images, write_shards
from vqrae_ds.manifest import hash_file

PHOTOS = Path(__file__).parent / "data" / "photos"


def list_keys(index: ShardIndex) -> list[str]:
    return [index.sample(i).key for i in range(index.num_samples)]


def test_samples_are_found_across_shards_of_any_size(tmp_path: Path) -> None:
    sizes = [0, 3, 1, 0, 0, 5, 0]
    expected = []
    for s, size in enumerate(sizes):
        members = [(f"{s}/{i}.png", bytes([s, i]) * (i + 1)) for i in range(size)]
        write_tar(tmp_path / f"{s}.tar", members)
        expected += members
    index = index_shards(tmp_path)
    assert index.num_samples == len(expected) == 9
    for i, (name, data) in enumerate(expected):
        sample = index.sample(i)
        assert sample.key + ".png" == name
        assert sample.shard.read_bytes()[sample.offset :][: sample.length] == data
    for number in (-1, 9):
        with pytest.raises(IndexError):
            index.sample(number)


def test_img2dataset_layout(tmp_path: Path) -> None:
    members = {
        "000000000.jpg": b"first",
        "000000000.json": b"{}",
        "000000000.txt": b"caption",
        "000000001.json": b"{}",
        "000000002.JPEG": b"second",
        "000000002.cls": b"7",
        "../../etc/passwd.png": b"third",
    }
    write_tar(tmp_path / "00000.tar", members.items())
    (tmp_path / "00000.parquet").write_bytes(b"")
    (tmp_path / "00000_stats.json").write_text("{}")
    index = index_shards(tmp_path)
    assert list_keys(index) == ["000000000", "000000002", "../../etc/passwd"]
    assert list(index.samples_of(0).extensions) == [0, 1, 2], "jpg, jpeg, png"
    assert [index.sample(i).shard for i in range(3)] == [tmp_path / "00000.tar"] * 3


def test_read_index_gives_back_what_was_written(tmp_path: Path) -> None:
    written = write_shards(find_images(PHOTOS), tmp_path, samples_per_shard=7, root=PHOTOS)
    read = read_index(tmp_path)
    assert read.num_samples == written.num_samples == 45
    for i in range(45):
        assert read.sample(i) == written.sample(i)
    for ours, theirs in zip(read.shards, written.shards, strict=True):
        assert ours == theirs
        assert hash_file(ours.path) == (ours.size, ours.xxh3_128)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_two_shards(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no shard with images"):
        index_shards(tmp_path)
    write_tar(tmp_path / "0.tar", [("a.json", b"{}")])
    with pytest.raises(ValueError, match="has no shard with images"):
        index_shards(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        index_shards(tmp_path / "missing")


def test_read_index_names_a_missing_or_resized_shard(shards: Path) -> None:
    assert read_index(shards).num_samples == 20
    with open(shards / "1.tar", "ab") as file:
        file.write(b"\0")
    with pytest.raises(
        ValueError, match=r"1\.tar has 20481 bytes, the index says 20480.*make_shards"
    ):
        read_index(shards)
    (shards / "1.tar").unlink()
    with pytest.raises(ValueError, match=r"1\.tar is missing.*make_shards"):
        read_index(shards)


def test_a_shard_that_was_written_anew_to_its_size_is_a_warning(
    shards: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, reader = shards / "1.tar", Reader(rank=0, world_size=1)
    whole, times = path.read_bytes(), path.stat()
    path.write_bytes(whole[::-1])
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
    for bad_samples in ("refuse", "skip"):
        caplog.clear()
        data = DataConfig(train=str(shards), bad_samples=bad_samples)
        assert open_index(data.train, data, reader).num_samples == 20
        first, second = (record.getMessage() for record in caplog.records)
        assert first.startswith(f"{path} was copied or written anew since it was indexed")
        assert f"make_shards.py --verify {shards}" in first
        assert second == "1 of 2 shards have another time"
    path.write_bytes(whole)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    caplog.clear()
    open_index(data.train, data, reader)
    payload = json.loads((shards / INDEX_NAME).read_text())
    assert [shard.pop("mtime_ns") for shard in payload["shards"]][1] == times.st_mtime_ns
    (shards / INDEX_NAME).write_text(json.dumps(payload))  # one from before there were times
    os.utime(path, (1, 1))
    assert open_index(data.train, data, reader).num_samples == 20
    assert not caplog.records


def test_a_run_goes_on_with_the_shards_that_it_went_through(tmp_path: Path) -> None:
    def made(folder: str, samples_per_shard: int) -> ShardIndex:
        photos = find_images(PHOTOS / "val")
        write_shards(photos, tmp_path / folder, samples_per_shard=samples_per_shard, root=PHOTOS)
        return read_index(tmp_path / folder)

    index, others = made("a", 3), made("b", 2)
    saved = {"num_samples": index.num_samples, "data_digest": index.digest()}
    assert index.num_samples == others.num_samples == 8
    check_same_data(index, saved)
    check_same_data(made("elsewhere", 3), saved)
    check_same_data(others, {"num_samples": 8})  # of a checkpoint that has no more
    check_same_data(others, {})
    reordered = ShardIndex(index.shards[::-1])
    altered = ShardIndex([index.shards[0]._replace(xxh3_128="0"), *index.shards[1:]])
    for wrong in (others, reordered, altered):
        with pytest.raises(ValueError, match="the 8 samples of the set .* in other shards, or in"):
            check_same_data(wrong, saved)
    with pytest.raises(ValueError, match="data.train has 16 samples, .* a set of 8"):
        check_same_data(merge([index, others]), saved)


@pytest.mark.parametrize(
    "damage",
    [
        {"file": "../1.tar"},
        {"file": "sub/1.tar"},
        {"table": [0, 1 << 40, "0"]},
        {"table": [-1, 10, "0"]},
        {"table": "abc"},
        {"num_samples": -1},
        {"num_samples": "many"},
        {"size": "large"},
        {"left_out": 3},
        {"mtime_ns": "noon"},
        {"unknown": 1},
    ],
)
def test_a_damaged_index_is_refused_by_name(shards: Path, damage: dict) -> None:
    payload = json.loads((shards / INDEX_NAME).read_text())
    payload["shards"][1] |= damage
    (shards / INDEX_NAME).write_text(json.dumps(payload))
    with pytest.raises(ValueError, match="index.json is not a readable index.*make_shards"):
        read_index(shards)


def test_no_damaged_byte_of_the_tables_goes_unnoticed(shards: Path) -> None:
    path = shards / SAMPLES_NAME
    whole = path.read_bytes()
    for at in range(len(whole)):
        altered = bytearray(whole)
        altered[at] ^= 1
        path.write_bytes(altered)
        _samples.cache_clear()
        index = read_index(shards)
        with pytest.raises(ValueError, match="index.samples was altered or cut.*make_shards"):
            for number in range(index.num_samples):
                index.sample(number)
        path.write_bytes(whole[:at])
        with pytest.raises(ValueError, match="index.samples beside it is shorter"):
            read_index(shards)


def test_an_index_of_the_version_before_gives_the_same_samples(shards: Path) -> None:
    index, entries = read_index(shards), []
    for number, shard in enumerate(index.shards):
        table = index.samples_of(number)
        columns = {
            "keys": table.keys,
            "extensions": [IMAGE_EXTENSIONS[code] for code in table.extensions],
            "offsets": table.offsets.tolist(),
            "lengths": table.lengths.tolist(),
        }
        named = {"file": shard.file, "size": shard.size, "xxh3_128": shard.xxh3_128}
        entries.append(named | columns)
    (shards / SAMPLES_NAME).unlink()
    (shards / INDEX_NAME).write_text(json.dumps({"format_version": 1, "shards": entries}))
    before = read_index(shards)
    assert [before.sample(i) for i in range(20)] == [index.sample(i) for i in range(20)]
    for damage in ({"offsets": [0]}, {"offsets": [-1] * 10}, {"lengths": [1 << 80] * 10}):
        payload = {"format_version": 1, "shards": [entries[0], entries[1] | damage]}
        (shards / INDEX_NAME).write_text(json.dumps(payload))
        with pytest.raises(ValueError, match="index.json is not a readable index"):
            read_index(shards)


@given(st.lists(st.tuples(st.text(max_size=9), st.integers(0, 5000), st.integers(0, 4))))
def test_a_table_gives_back_what_it_was_made_of(drawn: list) -> None:
    keys, lengths, offsets, at = [key.replace("\0", "") for key, _, _ in drawn], [], [], 0
    for _, length, blocks in drawn:
        at += 512 * (1 + blocks)
        offsets.append(at)
        lengths.append(length)
        at += -(-length // 512) * 512
    extensions = [IMAGE_EXTENSIONS[blocks % 4] for _, _, blocks in drawn]
    found = decode_samples(encode_samples(keys, extensions, offsets, lengths), len(drawn))
    assert found.keys == keys
    assert found.offsets.tolist() == offsets and found.lengths.tolist() == lengths
    assert [IMAGE_EXTENSIONS[code] for code in found.extensions] == extensions


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "\0\xff", '{"format_version": 99, "shards": []}', '{"format_version": 1}'],
)
def test_an_index_of_another_kind_is_refused(shards: Path, text: str) -> None:
    (shards / INDEX_NAME).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match="index.json is not a readable index"):
        read_index(shards)
