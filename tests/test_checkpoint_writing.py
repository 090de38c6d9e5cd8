"""What a rank writes of a checkpoint: records of what is on the disk, and errors that are kept."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.disks import Level, leave, mounted
from vqrae_ds.checkpoint import writing
from vqrae_ds.checkpoint.writing import RankWriter
from vqrae_ds.manifest import hash_file, list_files
from vqrae_ds.watchdog import Watchdog

STATE = {"weight": torch.arange(300_000).float(), "view": torch.randn(9)[2:5], "step": 3}
FULL = Path("/dev/full")  # takes nothing


@pytest.fixture
def writer(one_rank, tmp_path) -> RankWriter:
    folder = tmp_path / "step"
    folder.mkdir()
    return RankWriter(folder)


def test_what_is_written_is_what_torch_writes_and_what_is_recorded(writer):
    folder = writer.folder
    writer.save(STATE, folder / "state.pt")
    writer.write_text(folder / "text", "\N{GREEK SMALL LETTER ALPHA}\n" * 1000)
    writer.copy(folder / "state.pt", folder / "inner" / "copy.pt")
    (folder / "by_others").write_bytes(b"1")
    writer.add_unrecorded(set(writer.records))
    assert writer.failure is None
    assert writer.records == {name: hash_file(folder / name) for name in list_files(folder)}
    assert set(writer.records) == {"state.pt", "text", "inner/copy.pt", "by_others"}
    for mmap in (True, False):
        found = torch.load(folder / "inner" / "copy.pt", weights_only=True, mmap=mmap)
        assert found["step"] == 3
        assert all(torch.equal(found[name], STATE[name]) for name in ("weight", "view"))
    assert (folder / "text").read_text() == "\N{GREEK SMALL LETTER ALPHA}\n" * 1000


def test_a_file_is_synced_as_it_grows_and_each_piece_is_progress(writer, tmp_path, monkeypatch):
    synced = []
    sync = writing.os.fsync

    def sync_and_note(descriptor: int) -> None:
        sync(descriptor)
        synced.append((writing.os.fstat(descriptor).st_size, watchdog.since))

    monkeypatch.setattr(writing.os, "fsync", sync_and_note)
    monkeypatch.setattr(writing, "_SYNCED_BYTES", 1 << 18)
    path = writer.folder / "state.pt"
    with Watchdog(1000, tmp_path / "stacks", 0) as watchdog:
        writer.save(STATE, path)
    sizes, times = zip(*synced, strict=True)
    assert len(sizes) == path.stat().st_size // (1 << 18) + 1 == 5
    assert sizes[-1] == path.stat().st_size
    assert list(times) == sorted(set(times)), "the watchdog heard of it between any two syncs"
    assert writer.records["state.pt"] == hash_file(path)
    assert torch.equal(torch.load(path)["weight"], STATE["weight"])


@pytest.mark.parametrize("size", [1, 300_000])
@pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")
def test_the_first_error_is_kept_and_nothing_is_written_after_it(writer, size):
    (writer.folder / "full").symlink_to(FULL)
    writer.save({"weight": torch.zeros(size)}, writer.folder / "full")
    assert str(writer.failure) == f"rank 0: {writer.folder / 'full'}: No space left on device"
    writer.save(STATE, writer.folder / "after")
    writer.write_text(writer.folder / "no such folder" / "text", "")
    assert "full: No space" in str(writer.failure)
    assert writer.records == {} and not (writer.folder / "after").exists()


def test_no_fill_level_of_a_disk_passes_for_success(one_rank, tmp_path):
    """Page by page: what a file holds back until it is closed is not lost in silence."""
    with mounted(tmp_path / "disk") as disk:
        file = disk / "state.pt"
        state = {"weight": torch.zeros(5_000)}
        torch.save(state, file)
        pages = -(-file.stat().st_size // 4096)
        file.unlink()
        for free in range(pages + 1):
            leave(disk, Level(num_bytes=4096 * free))
            (disk / "rest").write_bytes(b"1" * (4096 * (free == 0)))  # a disk has one page at least
            writer = RankWriter(disk)
            writer.save(state, file)
            assert (writer.failure is None) == (free == pages), free
            assert (writer.records == {"state.pt": hash_file(file)}) == (free == pages)
            (disk / "rest").unlink()
            file.unlink(missing_ok=True)
            leave(disk, Level())


def test_other_errors_are_not_those_of_a_disk(writer):
    with pytest.raises(AttributeError, match="pickle"):
        writer.save({"no data": lambda: None}, writer.folder / "state.pt")
