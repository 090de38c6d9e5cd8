"""The shard index: what it lists, what it refuses, and that no lost sample goes unnoticed."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.memory import sampled_memory
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
from vqrae_ds.data.tar_members import ForwardReader, read_members
from vqrae_ds.manifest import hash_file

PHOTOS = Path(__file__).parent / "data" / "photos"


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def list_keys(index: ShardIndex) -> list[str]:
    return [index.sample(i).key for i in range(index.num_samples)]


def test_samples_are_found_across_shards_of_any_size(tmp_path: Path) -> None:
    sizes = [0, 3, 1, 0, 0, 5, 0]
    expected = []
    for s, size in enumerate(sizes):
        members = {f"{s}/{i}.png": bytes([s, i]) * (i + 1) for i in range(size)}
        write_tar(tmp_path / f"{s}.tar", members)
        expected += members.items()
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
    write_tar(
        tmp_path / "00000.tar",
        {
            "000000000.jpg": b"first",
            "000000000.json": b"{}",
            "000000000.txt": b"caption",
            "000000001.json": b"{}",
            "000000002.JPEG": b"second",
            "000000002.cls": b"7",
            "../../etc/passwd.png": b"third",
        },
    )
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
    """Two shards of ten members of 700 bytes, indexed."""
    for s in range(2):
        members = {f"{s}_{i}.png": bytes([65 + i]) * 700 for i in range(10)}
        write_tar(tmp_path / f"{s}.tar", members)
    index_shards(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "extension", ["pkl", "pickle", "pyd", "pth", "npy", "jpg.pkl", "sh", "tar", ""]
)
def test_a_planted_member_is_refused_by_name(tmp_path: Path, extension: str) -> None:
    name = f"0001.{extension}" if extension else "0001"
    write_tar(tmp_path / "bad.tar", {"0000.jpg": b"x", name: b"cos\nsystem\n(S'true'\ntR."})
    with pytest.raises(ValueError, match=rf"bad\.tar .*member '{name}' is refused"):
        index_shards(tmp_path)
    assert not (tmp_path / INDEX_NAME).exists()


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        member = tarfile.TarInfo("link.jpg")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(ValueError, match="member 'link.jpg' is refused"):
        index_shards(tmp_path)


def test_folders_in_a_shard_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "in" / "cats").mkdir(parents=True)
    (tmp_path / "in" / "cats" / "a.png").write_bytes(b"x")
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        tar.add(tmp_path / "in" / "cats", arcname="cats")
    assert list_keys(index_shards(tmp_path)) == ["cats/a"]


def test_two_images_of_one_key_in_a_shard_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "bad.tar", {"a.jpg": b"x", "b.jpg": b"x", "a.png": b"x"})
    with pytest.raises(ValueError, match=r"bad\.tar .*two images have the key 'a'"):
        index_shards(tmp_path)


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"a.jpg": b"x"})
    compressed = gzip.compress((tmp_path / "0.tar").read_bytes())
    (tmp_path / "1.tar.gz").write_bytes(compressed)
    with pytest.raises(ValueError, match=r"1\.tar\.gz is compressed"):
        index_shards(tmp_path)
    (tmp_path / "1.tar.gz").rename(tmp_path / "1.tar")
    with pytest.raises(ValueError, match=r"1\.tar is not a sound shard"):
        index_shards(tmp_path)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no shard with images"):
        index_shards(tmp_path)
    write_tar(tmp_path / "0.tar", {"a.json": b"{}"})
    with pytest.raises(ValueError, match="has no shard with images"):
        index_shards(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        index_shards(tmp_path / "missing")


def test_no_cut_loses_a_sample_unnoticed(shards: Path) -> None:
    path = shards / "1.tar"
    whole, num_samples = path.read_bytes(), index_shards(shards).num_samples
    end_of_archive = 10 * (512 + 1024) + 1024
    refused = 0
    for cut in range(0, len(whole), 512):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"1\.tar has .* bytes, the index says"):
            read_index(shards)
        if cut < end_of_archive:
            refused += 1
            with pytest.raises(ValueError, match=r"1\.tar is not a sound shard"):
                index_shards(shards)
        else:  # only padding is gone: every sample must be there
            (shards / INDEX_NAME).rename(shards / "kept")
            assert index_shards(shards).num_samples == num_samples
            (shards / "kept").rename(shards / INDEX_NAME)
    assert refused == end_of_archive // 512
    for cut in (1, 511, 513, 700, end_of_archive - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=r"1\.tar is not a sound shard"):
            index_shards(shards)


def test_a_damaged_header_does_not_end_a_shard_early(shards: Path) -> None:
    data = bytearray((shards / "0.tar").read_bytes())
    data[4 * 1536 + 3] ^= 1  # in the name of member 4: tarfile would stop there without a word
    (shards / "0.tar").write_bytes(data)
    with pytest.raises(ValueError, match=rf"0\.tar .*no tar header.* at byte {4 * 1536}"):
        index_shards(shards)


def test_a_second_archive_behind_the_first_is_refused(shards: Path) -> None:
    joined = (shards / "0.tar").read_bytes() + (shards / "1.tar").read_bytes()
    (shards / "0.tar").write_bytes(joined)
    with pytest.raises(ValueError, match=r"0\.tar is not a sound shard"):
        index_shards(shards)


@pytest.mark.timeout(20)
def test_a_member_of_negative_or_huge_size_is_refused(shards: Path) -> None:
    whole = (shards / "0.tar").read_bytes()
    for size in (b"\xff" * 10 + b"\xf8\x00", b"\x80" + b"\x7f" * 11):  # base 256: -2048 and 2**87
        header = bytearray(whole[1536:2048])
        header[124:136] = size
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        (shards / "0.tar").write_bytes(whole[:1536] + header + whole[2048:])
        with pytest.raises(ValueError, match=r"0\.tar .*member '0_1\.png' ends past the end"):
            index_shards(shards)


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


def test_members_are_those_that_tarfile_finds(tmp_path: Path) -> None:
    long = "d" * 90 + "/"
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        with tarfile.open(tmp_path / "0.tar", "w", format=form) as tar:
            for name in [
                "a.jpg",
                f"{long}b.jpg",
                *["\u00e9.jpg", long * 4 + "c.png"][: form % 3 + 1],
            ]:
                member = tarfile.TarInfo(name)
                member.size, member.mtime = 700, 1
                tar.addfile(member, io.BytesIO(bytes(700)))
            for name, kind in (("cats", tarfile.DIRTYPE), ("l.jpg", tarfile.SYMTYPE)):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = kind, long
                tar.addfile(member)
        with tarfile.open(tmp_path / "0.tar") as tar:
            theirs = [(m.name, m.offset_data, m.size, m.isreg(), m.isdir()) for m in tar]
        size = (tmp_path / "0.tar").stat().st_size
        for known_size in (size, None):
            with open(tmp_path / "0.tar", "rb") as file:
                ours = list(read_members(ForwardReader(file, size=known_size)))
            assert [(m.name.rstrip("/"), *m[1:]) for m in ours] == theirs


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K"])
def test_a_name_that_claims_to_be_huge_is_not_read(tmp_path: Path, kind: bytes) -> None:
    size = 200 << 20
    with open(tmp_path / "0.tar", "wb") as file:
        member = tarfile.TarInfo("name")
        member.type, member.size = kind, size
        file.write(member.tobuf(tarfile.USTAR_FORMAT))
        file.truncate(512 + size + 10240)
    peaks: dict[str, int] = {}
    with (
        sampled_memory(peaks),
        pytest.raises(ValueError, match=f"a name of {size} bytes at byte 0"),
    ):
        index_shards(tmp_path)
    assert peaks["RssAnon"] < 32 << 20
