"""The work of one rank: claim a shard, decode, encode, publish, until nothing is left to take.

No rank talks to another. The last one to finish a shard sees all of them there, and writes the
manifest. A rank that is killed loses the shards that it has claimed: the one that it encodes, and
those that its loader has begun, which is data.num_workers x data.prefetch_batches batches ahead.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vqrae_ds.config import DataConfig
from vqrae_ds.data.index import ShardIndex
from vqrae_ds.data.opening import decoding_of
from vqrae_ds.manifest import MANIFEST_NAME
from vqrae_ds.tokenizing.code_shard import Codes, encode_shard
from vqrae_ds.tokenizing.folder import (
    CLAIMS_NAME,
    Expected,
    Totals,
    finish,
    intact_header,
    is_finished,
    publish,
    remove_leftovers,
)
from vqrae_ds.tokenizing.job import Job, begin_or_join, source_of
from vqrae_ds.tokenizing.pieces import DecodedPiece, decoded_pieces, pieces_of
from vqrae_ds.tokenizing.progress import Progress
from vqrae_ds.tokenizing.sharing import Claims, Turn, turns
from vqrae_ds.worker import Worker

logger = logging.getLogger(__name__)

Encode = Callable[[Tensor], Tensor]  # images (B, 3, S, S) in [0, 1] -> codes (B, h, w)


class Task(NamedTuple):
    """All that a rank works with; `made_with` is kept in its files."""

    output: Path
    job: Job
    index: ShardIndex
    data: DataConfig
    worker: Worker
    batch_size: int
    made_with: dict[str, Any]


class Made(NamedTuple):
    """What one rank has made: files, and the images in them with and without codes."""

    shards: int = 0
    images: int = 0
    skipped: int = 0

    def __str__(self) -> str:
        skipped = f", {self.skipped} skipped" if self.skipped else ""
        return f"{self.shards} shards, {self.images} images{skipped}"


class Outcome(NamedTuple):
    """What a rank leaves: `totals` where it saw the whole job done, else None."""

    made: Made
    totals: Totals | None


def tokenize(task: Task, load: Callable[[], Encode]) -> Outcome:
    """Make the codes of all shards that no other rank has made or is making.

    `load` is asked for the model only where there is something to do. Raises `ValueError` where the
    folder is of another job; with `data.bad_samples: refuse` `BadSample` naming shard and key.
    """
    output, index = task.output, task.index
    begin_or_join(output, task.job)
    claims = Claims(output / CLAIMS_NAME)
    progress = Progress(output, index.samples_per_shard)
    made = Made()
    try:
        shards = _shards_to_do(task, claims, progress)
        first = next(shards, None)
        if first is not None:
            pieces = decoded_pieces(
                pieces_of(chain([first], shards), index, task.batch_size),
                index,
                image_size=task.job.image_size,
                decoding=decoding_of(task.data)._replace(mode="exact"),
                skip_bad=task.data.bad_samples == "skip",
                num_workers=task.data.num_workers,
                prefetch_batches=task.data.prefetch_batches,
            )
            made = _work(task, pieces, load(), claims, progress)
        if made.shards:
            logger.info("%s", progress.line())
        totals = finish(output, task.job, index)
        if totals is not None:
            remove_leftovers(output, claims)
    finally:
        claims.close()
    return Outcome(made, totals)


def _shards_to_do(task: Task, claims: Claims, progress: Progress) -> Iterator[int]:
    """Those that this rank has claimed, as they are asked for.

    Of its own share it reads what is there already; whether a shard of another's is sound is the
    other's to find out.
    """
    expected = Expected(task.job.digest, task.index)
    for turn in turns(len(task.index.shards), task.worker):
        if _is_done(task, turn, expected) or not claims.take(turn):
            continue
        if _is_done(task, turn, expected):  # by another rank, just before
            claims.let_go(turn.shard)
            continue
        progress.begin(turn.shard)
        yield turn.shard


def _is_done(task: Task, turn: Turn, expected: Expected) -> bool:
    return is_finished(task.output, turn.shard, expected, thoroughly=turn.is_own)


def _work(
    task: Task,
    pieces: Iterator[DecodedPiece],
    encode: Encode,
    claims: Claims,
    progress: Progress,
) -> Made:
    """Publish the shards that `pieces` are of."""
    made, parts, codes = Made(), [], []
    for part in pieces:
        piece = part.piece
        codes.append(_encoded(part, encode, task))
        parts.append(part._replace(images_B3SS=torch.empty(0)))  # the pixels of a shard are many
        progress.add(piece.end - piece.first)
        if piece.is_last:
            of_shard = _publish(task, piece.shard, parts, codes)
            made = Made(*(sum(pair) for pair in zip(made, of_shard, strict=True)))
            claims.let_go(piece.shard)
            progress.shard_done(piece.shard)
            parts, codes = [], []
    return made


def _publish(task: Task, shard: int, parts: list[DecodedPiece], codes: list[np.ndarray]) -> Made:
    """Publish the codes of a shard, unless the file that is there has those of more images.

    Samples may be tried again at a moment when more of them are away than were before.
    """
    images = sum(len(part.keys) for part in parts)
    skipped = sum(len(part.skipped) for part in parts)
    there = intact_header(task.output, shard, Expected(task.job.digest, task.index))
    if there is not None and there.shape[0] > images:
        text = "%s stays: it has the codes of %d images, of which %d can be read now"
        logger.warning(text, there.path, there.shape[0], images)
        return Made()
    data = _file_of(task, shard, parts, codes)
    (task.output / MANIFEST_NAME).unlink(missing_ok=True)  # it vouches for what was there
    publish(task.output, shard, data)
    return Made(1, images, skipped)


def _encoded(part: DecodedPiece, encode: Encode, task: Task) -> np.ndarray:
    """uint16 (B, h, w)."""
    if not part.keys:
        return np.empty((0, *task.job.grid), np.uint16)
    try:
        indices_Bhw = encode(part.images_B3SS)
    except ValueError as error:
        shard = task.index.shards[part.piece.shard].path
        where = f"{shard}, samples {part.keys[0]!r} to {part.keys[-1]!r}"
        raise ValueError(f"{where}: {error}") from error
    return indices_Bhw.to(torch.int32).cpu().numpy().astype(np.uint16)


def _file_of(task: Task, shard: int, parts: list[DecodedPiece], codes: list[np.ndarray]) -> bytes:
    crops = [crop for part in parts for crop in part.crops]
    columns = Codes(
        codes_Nhw=np.concatenate(codes),
        numbers_N=np.array([n for part in parts for n in part.numbers], np.int32),
        crops_N5=np.array(crops, np.int32).reshape(len(crops), 5),
        keys=[key for part in parts for key in part.keys],
    )
    skipped = [sample for part in parts for sample in part.skipped]
    if skipped:
        first = skipped[0]
        shard_path = task.index.shards[shard].path
        text = "%s: %d samples are skipped, the first %r (%s)"
        logger.warning(text, shard_path, len(skipped), first.key, first.kind)
    return encode_shard(
        columns,
        job=task.job.digest,
        source=source_of(task.index, shard),
        skipped=skipped,
        made_with=task.made_with,
    )
