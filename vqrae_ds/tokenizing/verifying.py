"""Whether a folder of codes is whole: every byte, every sample once, every total."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vqrae_ds.data.index import ShardIndex
from vqrae_ds.manifest import MANIFEST_NAME
from vqrae_ds.tokenizing.code_shard import Header, is_sound, read_columns
from vqrae_ds.tokenizing.folder import (
    Expected,
    Totals,
    finished_shards,
    header_of,
    read_manifest,
    totals_of,
)
from vqrae_ds.tokenizing.job import Job


class Verdict(NamedTuple):
    """`totals` as found; `damage` has a line for all that is not as it must be."""

    totals: Totals
    damage: list[str]


def verify(output: Path, job: Job, index: ShardIndex) -> Verdict:
    """Read all files and hold them against their seals, the index and the manifest.

    Raises `ValueError` where there is no manifest, or one that cannot be read.
    """
    manifest = read_manifest(output)
    expected, headers, damage = Expected(job.digest, index), [], []
    for shard in range(len(index.shards)):
        try:
            header = header_of(output, shard, expected)
            headers.append(header)
            damage += [f"{header.path.name}: {line}" for line in _faults(header, job, index, shard)]
        except (ValueError, OSError) as error:
            damage.append(str(error))
    for shard in sorted(set(finished_shards(output)) - set(range(len(index.shards)))):
        damage.append(f"codes of shard {shard}, which the index does not have")
    totals = totals_of(headers, index)
    if manifest["job"] != job._asdict():
        damage.append(f"{MANIFEST_NAME} is of another job")
    listed = [(entry["file"], entry["size"], entry["xxh3_128"]) for entry in manifest["shards"]]
    if listed != [(header.path.name, header.size, header.seal) for header in headers]:
        damage.append(f"{MANIFEST_NAME} lists other files than there are")
    if manifest["totals"] != totals._asdict():
        damage.append(f"{MANIFEST_NAME} has other totals than there are: {totals}")
    return Verdict(totals, damage)


def _faults(header: Header, job: Job, index: ShardIndex, shard: int) -> Iterator[str]:
    if not is_sound(header):
        yield "it was altered after it was written"
        return
    codes = read_columns(header)
    N = len(codes.keys)
    if header.shape != (N, *job.grid) or codes.crops_N5.shape != (N, 5):
        yield f"codes of shape {header.shape} for {N} keys and a grid of {job.grid}"
        return
    keys = index.samples_of(shard).keys
    with_codes = list(zip(codes.numbers_N.tolist(), codes.keys, strict=True))
    without = [(sample.number, sample.key) for sample in header.skipped]
    if sorted(with_codes + without) != list(enumerate(keys)):
        yield "its samples are not those of the index, each once"
    if N and int(np.max(codes.codes_Nhw)) >= job.num_codes:
        yield f"a code that is not below {job.num_codes}"
