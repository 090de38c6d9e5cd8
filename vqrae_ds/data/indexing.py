"""Builds the index of a folder of shards: by many processes, on many machines, in many attempts.

Each shard that was read is at once put into a journal in the folder. A build that was ended goes
on after those that the journals have. By the same means machines share the work: each builds its
part, and a last build of the whole merges them. `index.json` is written last.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash
from tqdm import tqdm

from vqrae_ds.config.data_paths import FROM_IMAGES
from vqrae_ds.data.faults import MISSING_SHARD, UNREADABLE
from vqrae_ds.data.index import (
    FORMAT_VERSION,
    INDEX_NAME,
    SAMPLES_NAME,
    Shard,
    ShardIndex,
    Table,
    as_json,
    read_index,
)
from vqrae_ds.data.pool import map_in_order
from vqrae_ds.data.shard_scan import COMPRESSED_SUFFIXES, ScannedShard, scan_shard
from vqrae_ds.manifest import sync, write_json_atomically

logger = logging.getLogger(__name__)

_JOURNAL = "index.journal"
_JOURNALS = f"{_JOURNAL}*"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # a file system that has none


class Part(NamedTuple):
    """One of `count` equal parts of the shards, numbered from 1."""

    number: int
    count: int


def index_shards(
    folder: Path,
    *,
    processes: int = 1,
    skip_bad: bool = False,
    part: Part | None = None,
    show_progress: bool = False,
) -> ShardIndex | None:
    """Index the tar shards that lie in `folder`, and write `index.json` there.

    Raises `ValueError` naming the shard that is compressed, cut or damaged, or holds a member that
    is no image and no companion of one, and `OSError` naming one that cannot be read. With
    `skip_bad` these are left out, counted in the index by their kinds. With a `part` only its
    shards are read, into a journal; then there is no index yet.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    every = _find_shards(folder)
    mine = every if part is None else every[part.number - 1 :: part.count]
    name = _JOURNAL if part is None else f"{_JOURNAL}-{part.number}-of-{part.count}"
    with _locked(folder / name) as journal:
        known = _read_journals(folder, every)
        missing = [path for path in mine if not _is_kept(known.get(path.name), skip_bad)]
        if not missing and not every:
            missing_shards = f"{folder} has no shard with images: no .tar file lies there"
            raise ValueError(f"{missing_shards}; {FROM_IMAGES}")
        progress = tqdm(total=len(mine), unit="shard", disable=None if show_progress else True)
        with progress:
            progress.update(len(mine) - len(missing))
            for scanned in map_in_order(partial(scan_shard, skip_bad=skip_bad), missing, processes):
                _append(journal, scanned)
                progress.update()
        journal.flush()
        if part is not None:
            logger.info("%s: part %d of %d is done", folder, *part)
            return None
        entries = _read_journals(folder, every)
        for path in every:
            if path.name not in entries:
                raise ValueError(f"{path} was changed while it was read: build the index once more")
        _write_index(folder, [entries[path.name] for path in every])
    for path in folder.glob(_JOURNALS):
        path.unlink()
    index = read_index(folder)
    logger.info("%s: %d images in %d shards", folder, index.num_samples, len(index.shards))
    return index


def left_out(shards: Sequence[Shard]) -> Counter[str]:
    """What the shards hold that is not in their index, by kind."""
    total: Counter[str] = Counter()
    for shard in shards:
        total.update(shard.left_out)
    return total


def _find_shards(folder: Path) -> list[Path]:
    suffixes = (".tar", *COMPRESSED_SUFFIXES)
    return sorted(path for path in folder.iterdir() if path.name.endswith(suffixes))


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """A journal to append to, of this process alone."""
    with open(path, "ab") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path} is being written by another process: let it end") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning("%s cannot be locked (%s): let no other build write it", path, error)
        _cut_to_whole_entries(path)
        try:
            yield journal
        finally:
            journal.flush()
            if path.exists() and not path.stat().st_size:
                path.unlink()


def _append(journal: BinaryIO, scanned: ScannedShard) -> None:
    if scanned.first_fault:
        logger.warning("left out: %s", scanned.first_fault)
    head = {
        "file": scanned.file,
        "mtime_ns": scanned.mtime_ns,
        "size": scanned.size,
        "xxh3_128": scanned.xxh3_128,
        "num_samples": scanned.num_samples,
        "left_out": scanned.left_out,
        "table": [len(scanned.table), xxhash.xxh3_64_hexdigest(scanned.table)],
    }
    journal.write(json.dumps(head).encode() + b"\n" + scanned.table)
    journal.flush()


def _is_kept(known: Shard | None, skip_bad: bool) -> bool:
    """Whether a journal spares the reading of a shard: not of one that may be read by now."""
    if known is None or known.left_out.keys() & {MISSING_SHARD, UNREADABLE}:
        return False
    return skip_bad or not known.left_out


def _read_journals(folder: Path, shards: Sequence[Path]) -> dict[str, Shard]:
    """The entries of all journals by file, of `shards` as they are now.

    A part's journal may have a shard as it was before it was written anew, or mended: such an entry
    is none, and that of the build which merges the parts comes before theirs.
    """
    now = {path.name: _size_and_time(path) for path in shards}
    found = {}
    for path in sorted(folder.glob(_JOURNALS), key=lambda path: path.name == _JOURNAL):
        for shard in _entries(path):
            if (shard.size, shard.mtime_ns) == now.get(shard.file):
                found[shard.file] = shard
    return found


def _size_and_time(path: Path) -> tuple[int, int]:
    """In bytes and ns; zeros, as `scan_shard` has them, where the file is not there."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_size, found.st_mtime_ns


def _entries(path: Path) -> Iterator[Shard]:
    """The whole entries of a journal; the last one may have been cut by the end of its writer."""
    with open(path, "rb") as file:
        while line := file.readline():
            start = file.tell()
            try:
                head = json.loads(line)
                length, digest = head.pop("table")
                shard = Shard(path.parent, **head, table=Table(path, start, length, digest))
            except (ValueError, KeyError, TypeError, AttributeError):
                return
            if xxhash.xxh3_64_hexdigest(file.read(length)) != digest:
                return
            yield shard


def _cut_to_whole_entries(path: Path) -> None:
    end = 0
    for shard in _entries(path):
        end = shard.table.offset + shard.table.length
    os.truncate(path, end)


def _write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Gather the tables in the order of the shards, then say where they are."""
    ShardIndex(shards)  # raises where there is no image at all
    temporary, placed, offset = folder / f"{SAMPLES_NAME}.tmp", [], 0
    with open(temporary, "wb") as file, contextlib.ExitStack() as stack:
        journals = {path: stack.enter_context(open(path, "rb")) for path in folder.glob(_JOURNALS)}
        for shard in shards:
            source = journals[shard.table.file]
            source.seek(shard.table.offset)
            file.write(source.read(shard.table.length))
            where = shard.table._replace(file=folder / SAMPLES_NAME, offset=offset)
            placed.append(shard._replace(table=where))
            offset += shard.table.length
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / SAMPLES_NAME)
    sync(folder)
    payload = {"format_version": FORMAT_VERSION, "shards": [as_json(shard) for shard in placed]}
    write_json_atomically(folder / INDEX_NAME, payload)
