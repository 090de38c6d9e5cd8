"""What an index is made of: members that are refused, and shards that are cut or damaged."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import pytest

from tests.memory import sampled_memory
from tests.tars import write_tar, write_two_shards
from vqrae_ds.data.index import (
    INDEX_NAME,
    read_index,
)
from vqrae_ds.data.indexing import index_shards
from vqrae_ds.data.tar_members import ForwardReader, read_members

PHOTOS = Path(__file__).parent / "data" / "photos"


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    return write_two_shards(tmp_path)


@pytest.mark.parametrize(
    "extension", ["pkl", "pickle", "pyd", "pth", "npy", "jpg.pkl", "sh", "tar", ""]
)
def test_a_planted_member_is_refused_by_name(tmp_path: Path, extension: str) -> None:
    name = f"0001.{extension}" if extension else "0001"
    write_tar(tmp_path / "bad.tar", [("0000.jpg", b"x"), (name, b"cos\nsystem\n(S'true'\ntR.")])
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
    index = index_shards(tmp_path)
    assert index.num_samples == 1 and index.sample(0).key == "cats/a"


def test_two_images_of_one_key_in_a_shard_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "bad.tar", [("a.jpg", b"x"), ("b.jpg", b"x"), ("a.png", b"x")])
    with pytest.raises(ValueError, match=r"bad\.tar .*two images have the key 'a'"):
        index_shards(tmp_path)


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [("a.jpg", b"x")])
    compressed = gzip.compress((tmp_path / "0.tar").read_bytes())
    (tmp_path / "1.tar.gz").write_bytes(compressed)
    with pytest.raises(ValueError, match=r"1\.tar\.gz is compressed"):
        index_shards(tmp_path)
    (tmp_path / "1.tar.gz").rename(tmp_path / "1.tar")
    with pytest.raises(ValueError, match=r"1\.tar is not a sound shard"):
        index_shards(tmp_path)


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
