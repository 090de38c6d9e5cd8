"""The folder of a job: a file a shard, and the manifest once all of them are there.

job.json                      what is tokenized by what (`job`)
codes-000012.safetensors      the codes of image shard 12 (`code_shard`), whole or not there
manifest.json                 all files with size and seal, and totals; written last, sealed
claims                        an empty file whose bytes are locked by who works (`sharing`)
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vqrae_ds.data.faults import MISSING_SHARD, RESIZED_SHARD, UNREADABLE
from vqrae_ds.data.index import ShardIndex
from vqrae_ds.data.indexing import left_out
from vqrae_ds.manifest import MANIFEST_NAME, read_sealed, sync, write_sealed
from vqrae_ds.tokenizing.code_shard import Header, is_sound, read_header
from vqrae_ds.tokenizing.job import Job, source_of
from vqrae_ds.tokenizing.sharing import Claims, Turn

CLAIMS_NAME = "claims"
FORMAT_VERSION = 1
_FILE = re.compile(r"codes-(\d{6,})\.safetensors")
_PARTIAL = re.compile(r"\.codes-(\d{6,})\.safetensors\.")
# What may be mended: samples that were skipped for it are tried again by the next start.
_MENDABLE = frozenset((MISSING_SHARD, RESIZED_SHARD, UNREADABLE))

logger = logging.getLogger(__name__)


class Totals(NamedTuple):
    """Of all shards: `samples` have codes, `skipped` and `left_out` (of the index) do not."""

    samples: int
    tokens: int
    skipped: dict[str, int]  # by kind
    left_out: dict[str, int]
    num_bytes: int

    def __str__(self) -> str:
        parts = [f"{self.samples} images, {self.tokens} codes, {self.num_bytes / 1e6:.4g} MB"]
        parts += [f"skipped: {count} x {kind}" for kind, count in sorted(self.skipped.items())]
        parts += [f"left out by the index: {n} x {k}" for k, n in sorted(self.left_out.items())]
        return "; ".join(parts)


class Expected(NamedTuple):
    """What a file has to be of."""

    job: str  # digest
    index: ShardIndex


def code_path(output: Path, shard: int) -> Path:
    """The file of a shard's codes."""
    return output / f"codes-{shard:06d}.safetensors"


def finished_shards(output: Path) -> Iterator[int]:
    """The numbers of the files that are there, sound or not."""
    for name in os.listdir(output):
        if match := _FILE.fullmatch(name):
            yield int(match[1])


def header_of(output: Path, shard: int, expected: Expected) -> Header:
    """What a shard's file says, held against job and index.

    Raises `ValueError` where it is damaged or of something else, and `FileNotFoundError`.
    """
    path = code_path(output, shard)
    header = read_header(path)
    if header.job != expected.job:
        raise ValueError(f"{path} is of another job")
    if header.source != source_of(expected.index, shard):
        raise ValueError(f"{path} is of another image shard ({header.source.file})")
    if header.shape[0] + len(header.skipped) != header.source.num_samples:
        raise ValueError(f"{path} has neither codes nor a fault for some samples")
    return header


def is_finished(output: Path, shard: int, expected: Expected, *, thoroughly: bool) -> bool:
    """Whether a shard's codes are there; `thoroughly` reads the file and holds it to its seal.

    Then a shard that had been away is also tried again, should it be back.
    """
    if not thoroughly:
        return code_path(output, shard).exists()
    header = intact_header(output, shard, expected)
    return header is not None and not any(s.kind in _MENDABLE for s in header.skipped)


def intact_header(output: Path, shard: int, expected: Expected) -> Header | None:
    """What a shard's file says, read to its end; None where there is none or it is damaged."""
    try:
        header = header_of(output, shard, expected)
    except (ValueError, FileNotFoundError):
        return None
    return header if is_sound(header) else None


def publish(output: Path, shard: int, data: bytes) -> None:
    """Bring a shard's file to the disk, whole, and then to its name.

    Only for who has claimed the shard: on one machine it is the only one that writes it.
    """
    path = code_path(output, shard)
    partial = path.with_name(f".{path.name}.{platform.node()}")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync(output)


def remove_leftovers(output: Path, claims: Claims) -> None:
    """Remove what killed ranks were writing, unless somebody is at that shard."""
    for name in os.listdir(output):
        if match := _PARTIAL.match(name):
            turn = Turn(int(match[1]), is_own=False)
            if claims.take(turn):
                (output / name).unlink(missing_ok=True)
                claims.let_go(turn.shard)


def finish(output: Path, job: Job, index: ShardIndex) -> Totals | None:
    """See that the manifest is of the files that are there; None where some are not there yet.

    One that is there may be of other files: a peer wrote it just before a file was made anew, and
    the rank that made it died. So it is written unless it says what the files say, and they are
    read again after it was written. A file that is damaged is not there yet: the rank whose share
    it is in makes it again, in this start or the next.
    """
    listed = None
    with contextlib.suppress(ValueError):
        listed = read_manifest(output)
    while (found := _payload(output, job, index)) != listed:
        if found is None:
            return None
        partial = output / f".{MANIFEST_NAME}.{platform.node()}.{os.getpid()}"
        write_sealed(partial, found)
        os.replace(partial, output / MANIFEST_NAME)
        sync(output)
        listed = found
    return None if found is None else Totals(**found["totals"])


def _payload(output: Path, job: Job, index: ShardIndex) -> dict[str, Any] | None:
    """What the manifest of the files that are there says; None where some are not there yet."""
    if not set(finished_shards(output)).issuperset(range(len(index.shards))):
        return None
    expected = Expected(job.digest, index)
    try:
        headers = [header_of(output, shard, expected) for shard in range(len(index.shards))]
    except (ValueError, FileNotFoundError) as error:
        logger.warning("%s has to wait: %s", MANIFEST_NAME, error)
        return None
    return {
        "format_version": FORMAT_VERSION,
        "job": job._asdict(),
        "totals": totals_of(headers, index)._asdict(),
        "shards": [_entry(header) for header in headers],
    }


def totals_of(headers: Sequence[Header], index: ShardIndex) -> Totals:
    """The sums over all files."""
    shapes = [header.shape for header in headers]
    return Totals(
        samples=sum(n for n, _, _ in shapes),
        tokens=sum(n * h * w for n, h, w in shapes),
        skipped=dict(Counter(sample.kind for header in headers for sample in header.skipped)),
        left_out=dict(left_out(index.shards)),
        num_bytes=sum(header.size for header in headers),
    )


def read_manifest(output: Path) -> dict[str, Any]:
    """The manifest. Raises `ValueError` where there is none yet, or it is damaged."""
    path = Path(output) / MANIFEST_NAME
    if not path.is_file():
        raise ValueError(
            f"{output} has no {MANIFEST_NAME}: it is no folder of codes, or some are not there "
            "yet; the command of tools/tokenize_shards.py again makes them"
        )
    payload = read_sealed(path)
    version = payload.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"{path} has format {version}, this code reads {FORMAT_VERSION}")
    for entry in payload["shards"]:
        if not _FILE.fullmatch(entry["file"]):
            raise ValueError(f"{path} names {entry['file']!r}, which is no file of codes")
    return payload


def listed_header(output: Path, entry: dict[str, Any]) -> Header:
    """The header of a file of the manifest. Raises `ValueError` where it is another file by now."""
    header = read_header(Path(output) / entry["file"])
    if header.seal != entry["xxh3_128"]:
        raise ValueError(f"{header.path} is not the file that {MANIFEST_NAME} lists")
    return header


def _entry(header: Header) -> dict[str, Any]:
    return {
        "file": header.path.name,
        "size": header.size,
        "xxh3_128": header.seal,
        "num_samples": header.shape[0],
        "num_skipped": len(header.skipped),
        "source": header.source.file,
    }
