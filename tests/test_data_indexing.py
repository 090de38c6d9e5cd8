"""Building an index: by several processes and machines, in several attempts, around faults."""

from __future__ import annotations

import json
import os
import platform
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import start_python
from tests.tars import write_tar
from vqrae_ds.data import indexing
from vqrae_ds.data.index import INDEX_NAME, SAMPLES_NAME, merge, read_index
from vqrae_ds.data.indexing import Part, index_shards, left_out
from vqrae_ds.manifest import hash_file

PICKLE = b"cos\nsystem\n(S'touch %b'\ntR."


def make_shards(folder: Path, number: int) -> Path:
    folder.mkdir(exist_ok=True)
    for s in range(number):
        members = [(f"{s:03d}{i:03d}.jpg", bytes([s, i]) * (i + 1)) for i in range(s % 4)]
        os.utime(write_tar(folder / f"{s:05d}.tar", members), (1, 1))  # the index keeps it
    return folder


def written(folder: Path) -> tuple[bytes, bytes]:
    return (folder / INDEX_NAME).read_bytes(), (folder / SAMPLES_NAME).read_bytes()


def test_processes_and_parts_write_the_same_index(tmp_path: Path) -> None:
    expected = written_by_one(tmp_path)
    several = make_shards(tmp_path / "several", 11)
    index_shards(several, processes=2)
    assert written(several) == expected
    parts = make_shards(tmp_path / "parts", 11)
    for number in (2, 1, 3):
        assert index_shards(parts, part=Part(number, 3)) is None
        assert not (parts / INDEX_NAME).exists()
    index_shards(parts)
    assert written(parts) == expected
    assert not list(parts.glob("index.journal*"))


def written_by_one(tmp_path: Path) -> tuple[bytes, bytes]:
    one = make_shards(tmp_path / "one", 11)
    index_shards(one)
    return written(one)


def test_the_last_build_reads_no_shard_that_a_part_has_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, read = make_shards(tmp_path / "shards", 8), []
    scan = indexing.scan_shard

    def noting(path: Path, **options: bool) -> object:
        read.append(path.name)
        return scan(path, **options)

    monkeypatch.setattr(indexing, "scan_shard", noting)
    index_shards(folder, part=Part(1, 2))
    assert read == [f"{s:05d}.tar" for s in (0, 2, 4, 6)]
    os.utime(folder / "00002.tar", (2, 2))  # it has been changed since
    index_shards(folder)
    assert sorted(read[4:]) == [f"{s:05d}.tar" for s in (1, 2, 3, 5, 7)]


@pytest.mark.parametrize("build", [None, Part(2, 2), Part(1, 3)])
def test_a_shard_that_is_written_anew_between_two_builds_is_read_anew(
    tmp_path: Path, build: Part | None
) -> None:
    """Of the same size: tar files are padded. The merge finds it in older journals as well."""
    folder = make_shards(tmp_path / "shards", 8)
    index_shards(folder, part=Part(1, 2))
    path = folder / "00002.tar"
    size = path.stat().st_size
    write_tar(path, [("new.png", b"n" * 700), ("other.jpg", b"o")])
    assert path.stat().st_size == size
    if build is not None:
        index_shards(folder, part=build)
    index = index_shards(folder)
    assert index.shards[2].samples().keys == ["new", "other"]
    assert index.shards[2].xxh3_128 == hash_file(path).xxh3_128
    alone = make_shards(tmp_path / "alone", 8)
    write_tar(alone / "00002.tar", [("new.png", b"n" * 700), ("other.jpg", b"o")])
    os.utime(alone / "00002.tar", ns=(1, path.stat().st_mtime_ns))
    index_shards(alone)
    assert written(folder) == written(alone)


def test_a_shard_that_changes_while_it_is_read_is_not_indexed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scan = make_shards(tmp_path / "shards", 3), indexing.scan_shard

    def growing(path: Path, **options: bool) -> object:
        scanned = scan(path, **options)
        if path.name == "00001.tar":
            path.write_bytes(path.read_bytes() + bytes(10240))
        return scanned

    monkeypatch.setattr(indexing, "scan_shard", growing)
    with pytest.raises(ValueError, match=r"00001\.tar was changed while it was read: build"):
        index_shards(folder)
    assert not (folder / INDEX_NAME).exists()
    monkeypatch.setattr(indexing, "scan_shard", scan)
    assert index_shards(folder).num_samples == 0 + 1 + 2


def test_a_shard_that_cannot_be_read_is_left_out_where_it_is_not_refused(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "shards", 4)
    (folder / "00001.tar").unlink()
    (folder / "00001.tar").symlink_to(tmp_path / "gone.tar")
    (folder / "00002.tar").unlink()
    (folder / "00002.tar").symlink_to("/proc/self/mem")  # at byte 0 it gives an error of the device
    (folder / "00004.tar").mkdir()
    with pytest.raises(FileNotFoundError, match="00001.tar"):
        index_shards(folder)
    for part in (Part(2, 2), None):  # what a part could not read the merge reads, or tries to
        index = index_shards(folder, skip_bad=True, part=part)
    assert index.num_samples == 3 and index.shards[3].num_samples == 3
    assert left_out(index.shards) == {"missing_shard": 1, "unreadable": 2}
    assert read_index(folder).shards == index.shards
    index_shards(folder, skip_bad=True, part=Part(2, 2))
    (folder / "00001.tar").unlink()
    os.utime(write_tar(folder / "00001.tar", [("back.jpg", b"b")]), (1, 1))
    (folder / "00002.tar").unlink()
    write_tar(folder / "00002.tar", [("c.jpg", b"c")])
    (folder / "00004.tar").rmdir()
    again = index_shards(folder)
    assert again.num_samples == 5 and not left_out(again.shards)


# The kernel refuses the one call, as file systems do that have no locks.
WITHOUT_LOCKS = """
import ctypes, errno, logging, struct, sys
from pathlib import Path
from vqrae_ds.data.indexing import index_shards
FLOCK = {"x86_64": 73, "aarch64": 32}[sys.argv[2]]
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, FLOCK), (0x06, 0, 0, 0x50000 | errno.ENOLCK),
         (0x06, 0, 0, 0x7FFF0000)]  # load the number; is it flock? then ENOLCK; else allow
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("rules", ctypes.c_void_p)]
program = Program(len(rules), ctypes.addressof(code))
prctl = ctypes.CDLL(None, use_errno=True).prctl
if prctl(38, 1, 0, 0, 0) or prctl(22, 2, ctypes.byref(program), 0, 0):
    sys.exit(77)
logging.basicConfig()
index_shards(Path(sys.argv[1]))
"""


@pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() not in ("x86_64", "aarch64"),
    reason="the number of a system call",
)
def test_a_file_system_without_locks_is_no_obstacle(tmp_path: Path) -> None:
    folder = make_shards(tmp_path / "shards", 3)
    builder = start_python("-c", WITHOUT_LOCKS, str(folder), platform.machine())
    _, said = builder.communicate(timeout=300)
    if builder.returncode == 77:
        pytest.skip("this kernel filters no system calls")
    assert builder.returncode == 0, said
    assert "index.journal cannot be locked" in said and "No locks available" in said
    assert read_index(folder).num_samples == 3


BUILD = """
import sys
from pathlib import Path
from vqrae_ds.data import indexing
scan = indexing.scan_shard
def as_far_as_the_gate(path, **options):
    if path.name == "00020.tar":
        open(sys.argv[2]).read()
    return scan(path, **options)
indexing.scan_shard = as_far_as_the_gate
indexing.index_shards(Path(sys.argv[1]))
"""


def test_a_build_that_is_killed_goes_on(tmp_path: Path) -> None:
    folder, gate = make_shards(tmp_path / "shards", 60), tmp_path / "gate"
    os.mkfifo(gate)  # nobody writes to it: who opens it waits until it is killed
    builder = start_python("-c", BUILD, str(folder), str(gate))
    journal = folder / "index.journal"
    deadline = time.monotonic() + 300
    while not journal.exists() or len(list(indexing._entries(journal))) < 20:
        assert builder.poll() is None and time.monotonic() < deadline, builder.communicate()
        time.sleep(0.01)
    with pytest.raises(ValueError, match="index.journal is being written by another process"):
        index_shards(folder)
    builder.send_signal(signal.SIGKILL)
    builder.communicate()
    assert len(list(indexing._entries(journal))) == 20 and not (folder / INDEX_NAME).exists()
    with open(journal, "ab") as file:
        file.write(b'{"file": "00059.tar", "size": 1')  # as a kill amid a write leaves it
    index_shards(folder)
    other = make_shards(tmp_path / "other", 60)
    index_shards(other)
    assert written(folder) == written(other)


def test_indexes_of_several_folders_are_one_data_set(tmp_path: Path) -> None:
    folders = [make_shards(tmp_path / name, number) for name, number in (("a", 5), ("b", 3))]
    for folder in folders:
        index_shards(folder)
    merged = merge([read_index(folder) for folder in folders])
    assert merged.num_samples == 6 + 3
    found = [merged.sample(i) for i in range(9)]
    assert [sample.shard.parent.name for sample in found] == ["a"] * 6 + ["b"] * 3
    for sample in found:
        s, i = int(sample.key[:3]), int(sample.key[3:])
        data = sample.shard.read_bytes()[sample.offset :][: sample.length]
        assert data == bytes([s, i]) * (i + 1)


def test_faults_are_left_out_and_counted_where_they_are_not_refused(tmp_path: Path) -> None:
    folder, payload = tmp_path / "shards", tmp_path / "executed"
    folder.mkdir()
    code = PICKLE % str(payload).encode()
    sound = [("a.jpg", b"a" * 600), ("a.json", b"{}"), ("b.png", b"b")]
    names = ["x.pkl", "x.pyd", "x.pth", "x.sh", "x.py", "x.npz", "x.jpg.pkl", "x", "../../y.so"]
    write_tar(folder / "0.tar", [*sound, *((name, code) for name in names), ("a.webp", b"again")])
    whole = write_tar(folder / "1.tar", [*sound, ("c.jpg", b"c" * 3000)])
    os.truncate(whole, 4 * 512 + 2 * 512 + 512 + 100)
    damaged = bytearray(write_tar(folder / "2.tar", sound).read_bytes())
    damaged[4 * 512 + 512 + 3] ^= 1
    (folder / "2.tar").write_bytes(damaged)
    (folder / "3.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(ValueError, match=r"0\.tar is not a sound shard: member 'x.pkl' is refused"):
        index_shards(folder)
    index = index_shards(folder, skip_bad=True)
    keys = [index.sample(i).key for i in range(index.num_samples)]
    assert keys == ["a", "b", "a", "b", "a"]
    assert left_out(index.shards) == {
        "refused_member": len(names),
        "duplicate_key": 1,
        "cut_shard": 1,
        "damaged_shard": 1,
        "compressed_shard": 1,
    }
    listed = json.loads((folder / INDEX_NAME).read_text())["shards"]
    assert listed[1]["left_out"] == {"cut_shard": 1}
    assert not payload.exists()
    with pytest.raises(ValueError, match="x.pkl"):  # what was skipped before is not forgotten
        index_shards(folder)
