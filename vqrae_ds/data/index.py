"""The shard index: which images folders of tar shards hold, and where their bytes lie.

A data set is one folder or more of uncompressed tar shards in the webdataset layout, each with
`index.json`, the list of its shards, and `index.samples`, a table of samples a shard. The index
gives random access without parsing a tar, and makes a lost sample visible where tar readers end
short without a word. A process holds the list of shards, and the tables of those few that it reads
from. Keys are labels only: no path is built from one.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xxhash

from vqrae_ds.config.data_paths import INDEX_NAME, index_command, missing_index
from vqrae_ds.data.faults import MISSING_SHARD, RESIZED_SHARD, UNREADABLE, BadSample
from vqrae_ds.data.sample_table import (
    IMAGE_EXTENSIONS,
    ShardSamples,
    decode_samples,
    encode_samples,
)

SAMPLES_NAME = "index.samples"
FORMAT_VERSION = 2
_COLUMNS_IN_JSON = 1  # the version before: one file, right for millions of images
_TABLES_KEPT = 8
RETOUCHED_SHARD = "retouched_shard"  # written or copied since, to the size that it had


class Sample(NamedTuple):
    """One image: `length` bytes at byte `offset` of the file `shard`."""

    shard: Path
    key: str
    offset: int
    length: int
    shard_size: int | None = None  # bytes that the shard had when it was indexed


class Table(NamedTuple):
    """Where the table of a shard's samples lies in a file."""

    file: Path
    offset: int
    length: int
    xxh3_64: str


class Shard(NamedTuple):
    """One tar file."""

    folder: Path
    file: str
    size: int  # bytes
    xxh3_128: str
    num_samples: int
    table: Table | bytes  # where it lies, or the table itself
    left_out: dict[str, int]  # members that were passed over for a fault, by its kind
    mtime_ns: int | None = None  # when it was changed last; None in indexes that do not say

    @property
    def path(self) -> Path:
        return self.folder / self.file

    def samples(self) -> ShardSamples:
        """All samples. `BadSample` where their table cannot be read, `ValueError` if damaged."""
        return _samples(self.table, self.num_samples, self.size)


class ShardFault(NamedTuple):
    """A shard that is not as it was when it was indexed."""

    kind: str  # MISSING_SHARD, UNREADABLE, RESIZED_SHARD or RETOUCHED_SHARD
    message: str


class ShardIndex:
    """The images of a data set, numbered 0 .. num_samples - 1 in the order of `shards`."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        """Raises `ValueError` when `shards` hold no image at all."""
        self.shards = tuple(shards)
        # Shard s holds the samples starts[s] .. starts[s + 1] - 1.
        counts = [shard.num_samples for shard in self.shards]
        self.starts = np.cumsum([0, *counts], dtype=np.int64)
        if self.num_samples == 0:
            where = ", ".join(sorted({str(shard.folder) for shard in self.shards})) or "the data"
            raise ValueError(f"{where} has no shard with images ({', '.join(IMAGE_EXTENSIONS)})")

    @property
    def samples_per_shard(self) -> np.ndarray:
        """(S,) int64."""
        return np.diff(self.starts)

    @property
    def num_samples(self) -> int:
        return int(self.starts[-1])

    def digest(self) -> str:
        """XXH3 of what decides which sample has which number: shards in their order, as indexed."""
        listed = [[shard.file, shard.num_samples, shard.xxh3_128] for shard in self.shards]
        return xxhash.xxh3_128_hexdigest(json.dumps(listed).encode())

    def sample(self, number: int) -> Sample:
        """Where image `number` lies, by bisection over shards.

        Raises `IndexError` out of range, and as `Shard.samples` does.
        """
        if not 0 <= number < self.num_samples:
            raise IndexError(f"sample {number} of a data set of {self.num_samples}")
        s = int(np.searchsorted(self.starts, number, side="right")) - 1
        shard, i = self.shards[s], number - int(self.starts[s])
        table = self.samples_of(s)
        place = int(table.offsets[i]), int(table.lengths[i])
        return Sample(shard.path, table.keys[i], *place, shard.size)

    def samples_of(self, shard_number: int) -> ShardSamples:
        """All samples of a shard. Raises as `Shard.samples` does."""
        return self.shards[shard_number].samples()


def merge(indexes: Sequence[ShardIndex]) -> ShardIndex:
    """One data set of several, in their order."""
    return ShardIndex([shard for index in indexes for shard in index.shards])


def read_index(folder: Path, *, check_shards: bool = True) -> ShardIndex:
    """Read the index of `folder` and check that its shards are there with the listed sizes.

    Raises `ValueError` naming the file that is missing, resized or cannot be understood.
    """
    folder = Path(folder)
    path = folder / INDEX_NAME
    if fault := missing_index(folder):
        raise ValueError(fault)
    try:
        payload: dict[str, Any] = json.loads(path.read_text())
        version = payload["format_version"]
        if version not in (FORMAT_VERSION, _COLUMNS_IN_JSON):
            raise ValueError(f"format version {version}, this code reads {FORMAT_VERSION}")
        read_shard = _shard_of_columns if version == _COLUMNS_IN_JSON else _shard
        shards = [read_shard(folder, **fields) for fields in payload["shards"]]
        ends = [s.table.offset + s.table.length for s in shards if isinstance(s.table, Table)]
        if ends and (folder / SAMPLES_NAME).stat().st_size < max(ends):
            raise ValueError(f"{SAMPLES_NAME} beside it is shorter than it says")
    except (ValueError, KeyError, TypeError, OSError, OverflowError) as error:
        raise ValueError(
            f"{path} is not a readable index ({error}): {index_command(folder)}"
        ) from error
    index = ShardIndex(shards)
    if check_shards:
        for fault in shard_faults(index.shards):
            if fault.kind != RETOUCHED_SHARD:
                raise ValueError(fault.message)
    return index


def shard_faults(shards: Sequence[Shard]) -> Iterator[ShardFault]:
    """The shards that are missing, or have not the size or the time that their index says.

    Those that could not be read for the index have no sample there, and are passed over.
    """
    for shard in shards:
        if shard.left_out.keys() & {MISSING_SHARD, UNREADABLE}:
            continue
        try:
            found = shard.path.stat()
        except OSError as error:
            is_missing = isinstance(error, FileNotFoundError)
            kind, text = (MISSING_SHARD, "is missing") if is_missing else (UNREADABLE, error)
            message = f"{shard.path} {text}: bring it back, or {index_command(shard.folder)}"
            yield ShardFault(kind, message)
            continue
        if found.st_size != shard.size:
            text = f"{shard.path} has {found.st_size} bytes, the index says {shard.size}"
            yield ShardFault(
                RESIZED_SHARD, f"{text}: copy it again, or {index_command(shard.folder)}"
            )
        elif shard.mtime_ns not in (None, found.st_mtime_ns):
            text = f"{shard.path} was copied or written anew since it was indexed"
            check = f"`python tools/make_shards.py --verify {shard.folder}`"
            yield ShardFault(RETOUCHED_SHARD, f"{text}: {check} tells which")


def as_json(shard: Shard) -> dict[str, Any]:
    """A shard as `index.json` lists it."""
    assert isinstance(shard.table, Table)
    table = [shard.table.offset, shard.table.length, shard.table.xxh3_64]
    return {
        "file": shard.file,
        "size": shard.size,
        "xxh3_128": shard.xxh3_128,
        "num_samples": shard.num_samples,
        "table": table,
        "left_out": shard.left_out,
        "mtime_ns": shard.mtime_ns,
    }


def _shard(
    folder: Path,
    *,
    file: str,
    size: int,
    xxh3_128: str,
    num_samples: int,
    table: list,
    left_out: dict[str, int],
    mtime_ns: int | None = None,
) -> Shard:
    offset, length, digest = table
    numbers = (size, num_samples, offset, length)
    if not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f"{file} has a size that is no number: {numbers}")
    if not isinstance(mtime_ns, int | None):
        raise ValueError(f"{file} has a time that is no number: {mtime_ns}")
    where = Table(folder / SAMPLES_NAME, offset, length, str(digest))
    entry = _plain_name(file), size, xxh3_128, num_samples, where, dict(left_out), mtime_ns
    return Shard(folder, *entry)


def _shard_of_columns(
    folder: Path,
    *,
    file: str,
    size: int,
    xxh3_128: str,
    keys: list[str],
    extensions: list[str],
    offsets: list[int],
    lengths: list[int],
) -> Shard:
    """A shard of the version before."""
    if {len(column) for column in (extensions, offsets, lengths)} != {len(keys)}:
        raise ValueError(f"{file} has columns of different lengths")
    if any(offset + length > size for offset, length in zip(offsets, lengths, strict=True)):
        raise ValueError(f"{file} has a sample outside its {size} bytes")
    table = encode_samples(keys, extensions, offsets, lengths)
    return Shard(folder, _plain_name(file), int(size), xxh3_128, len(keys), table, {})


def _plain_name(file: str) -> str:
    if Path(file).name != file:
        raise ValueError(f"the shard name {file!r} leads out of the folder")
    return file


@lru_cache(maxsize=_TABLES_KEPT)
def _samples(table: Table | bytes, num_samples: int, shard_size: int) -> ShardSamples:
    if isinstance(table, bytes):
        return decode_samples(table, num_samples)
    data = _read_table(table)
    if xxhash.xxh3_64_hexdigest(data) != table.xxh3_64:
        raise ValueError(f"{table.file} was altered or cut: {index_command(table.file.parent)}")
    samples = decode_samples(data, num_samples)
    if num_samples and int((samples.offsets + samples.lengths).max()) > shard_size:
        raise ValueError(f"{table.file} has a sample outside its shard of {shard_size} bytes")
    return samples


def _read_table(table: Table) -> bytes:
    """It is asked for twice: a file server may have moved on. Raises `BadSample`."""

    def read() -> bytes:
        with open(table.file, "rb") as file:
            file.seek(table.offset)
            return file.read(table.length)

    with contextlib.suppress(OSError):
        return read()
    try:
        return read()
    except OSError as error:
        message = f"the table of a shard's samples cannot be read: {table.file}: {error}"
        raise BadSample(message, UNREADABLE) from error
