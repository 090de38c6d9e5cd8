"""Builds the index of a folder of shards: by many processes, on many machines, in many attempts.

Each shard that was read is at once put into a journal in the folder. A build that was ended goes
on after those that the journals have. By the same means machines share the work: each builds its
part, and a last build of the whole merges them. `index.json` is written last.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import BinaryIO, NamedTuple

import xxhash
from tqdm import tqdm

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
from vqrae_ds.data.shard_scan import COMPRESSED_SUFFIXES, ScannedShard, scan_shard
from vqrae_ds.manifest import sync, write_json_atomically

logger = logging.getLogger(__name__)

_JOURNALS = "index.journal*"
_TIMES_MORE_WAITING = 4  # shards given out a process, so that none is idle


class Part(NamedTuple):
    """One of `count` equal parts of the shards, numbered from 1."""

    number: int
    count: int


class _Entry(NamedTuple):
    """A shard in a journal: when it was changed last, and its entry with the table there."""

    mtime_ns: int
    shard: Shard


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
    is no image and no companion of one. With `skip_bad` these are left out, counted in the index by
    their kinds. With a `part` only its shards are read, into a journal; then there is no index yet.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    every = _find_shards(folder)
    mine = every if part is None else every[part.number - 1 :: part.count]
    name = "index.journal" if part is None else f"index.journal-{part.number}-of-{part.count}"
    with _locked(folder / name) as journal:
        known = _read_journals(folder, skip_bad=skip_bad)
        missing = [path for path in mine if not _is_known(known, path)]
        if not missing and not every:
            raise ValueError(f"{folder} has no shard with images: no .tar file lies there")
        progress = tqdm(total=len(mine), unit="shard", disable=None if show_progress else True)
        with progress:
            progress.update(len(mine) - len(missing))
            for scanned, mtime_ns in _scan(missing, processes, skip_bad):
                _append(journal, scanned, mtime_ns)
                progress.update()
        journal.flush()
        if part is not None:
            logger.info("%s: part %d of %d is done", folder, *part)
            return None
        entries = _read_journals(folder, skip_bad=skip_bad)
        _write_index(folder, [entries[path.name].shard for path in every])
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


def _scan(
    paths: Sequence[Path], processes: int, skip_bad: bool
) -> Iterator[tuple[ScannedShard, int]]:
    """Each shard in the given order, and when it was changed last before it was read."""
    scan = partial(_scan_one, skip_bad=skip_bad)
    if processes <= 1 or len(paths) <= 1:
        yield from map(scan, paths)
        return
    # Not forked: what runs here may have threads.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = []
        try:
            for path in paths:
                waiting.append(pool.submit(scan, path))
                if len(waiting) >= processes * _TIMES_MORE_WAITING:
                    yield waiting.pop(0).result()
            for future in waiting:
                yield future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _scan_one(path: Path, *, skip_bad: bool) -> tuple[ScannedShard, int]:
    mtime_ns = path.stat().st_mtime_ns
    return scan_shard(path, skip_bad=skip_bad), mtime_ns


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[BinaryIO]:
    """A journal to append to, of this process alone."""
    with open(path, "ab") as journal:
        try:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path} is being written by another process: let it end") from error
        _cut_to_whole_entries(path)
        try:
            yield journal
        finally:
            journal.flush()
            if path.exists() and not path.stat().st_size:
                path.unlink()


def _append(journal: BinaryIO, scanned: ScannedShard, mtime_ns: int) -> None:
    if scanned.first_fault:
        logger.warning("left out: %s", scanned.first_fault)
    head = {
        "file": scanned.file,
        "mtime_ns": mtime_ns,
        "size": scanned.size,
        "xxh3_128": scanned.xxh3_128,
        "num_samples": scanned.num_samples,
        "left_out": scanned.left_out,
        "table": [len(scanned.table), xxhash.xxh3_64_hexdigest(scanned.table)],
    }
    journal.write(json.dumps(head).encode() + b"\n" + scanned.table)
    journal.flush()


def _is_known(known: dict[str, _Entry], path: Path) -> bool:
    entry, now = known.get(path.name), path.stat()
    return entry is not None and (entry.shard.size, entry.mtime_ns) == (
        now.st_size,
        now.st_mtime_ns,
    )


def _read_journals(folder: Path, *, skip_bad: bool) -> dict[str, _Entry]:
    """The shards of all journals by file. Without `skip_bad` those with faults are read again."""
    found = {}
    for path in sorted(folder.glob(_JOURNALS)):
        for entry in _entries(path):
            if skip_bad or not entry.shard.left_out:
                found[entry.shard.file] = entry
    return found


def _entries(path: Path) -> Iterator[_Entry]:
    """The whole entries of a journal; the last one may have been cut by the end of its writer."""
    with open(path, "rb") as file:
        while line := file.readline():
            start = file.tell()
            try:
                head = json.loads(line)
                length, digest = head.pop("table")
                mtime_ns = head.pop("mtime_ns")
            except (ValueError, KeyError, TypeError, AttributeError):
                return
            if xxhash.xxh3_64_hexdigest(file.read(length)) != digest:
                return
            table = Table(path, start, length, digest)
            yield _Entry(mtime_ns, Shard(path.parent, **head, table=table))


def _cut_to_whole_entries(path: Path) -> None:
    end = 0
    for entry in _entries(path):
        end = entry.shard.table.offset + entry.shard.table.length
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
