"""Shards without an index, local or remote, drawn at random for ever: the weaker promise.

Each loader process draws shards with replacement, reads them forwards, and draws samples out of
those that it holds. Unlike `stream` it does not promise

* that a sample comes once an epoch: some come twice, some late;
* that a run that resumes sees what an uninterrupted one would have seen: it draws anew, from its
  seed and the number of samples consumed;
* the same samples with another number of ranks or loader processes;
* that a shard has all of its samples: one that is cut is noticed, one that was made without some of
  them is not.

It does promise equal steps on all ranks, bounded memory, and an end where nothing can be used. Its
share of bad samples is that of the good ones: a shard that is cut or cannot be read counts as one.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from typing import BinaryIO, NamedTuple

import xxhash
from torch.utils.data import IterableDataset, get_worker_info

from vqrae_ds.data.crops import Augmentation, SampleSeed, random_crop
from vqrae_ds.data.decode import Decoding, as_float, decode_crop
from vqrae_ds.data.faults import (
    CUT_SHARD,
    DAMAGED_SHARD,
    KINDS,
    MISSING_SHARD,
    TOO_LONG,
    UNREADABLE,
    BadSample,
    Policy,
    Skipped,
)
from vqrae_ds.data.loader import Batch, Item, load
from vqrae_ds.data.remote import check_url, open_shard
from vqrae_ds.data.shard_scan import ImageNames, RefusedMember
from vqrae_ds.data.tar_members import BrokenTar, ForwardReader, read_members

EMPTY_SHARDS = 32  # in a row: then there is nothing to read
# Before the next shard where one could not be read, doubled from one to the next: a store that is
# away for a while must not use up all of them at once. The pauses of a row add up to 12 minutes.
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 30.0  # seconds
MOST_FAULTS = 10_000  # in a row, without an image: then there is nothing to see
TOLD_FAULTS = 3  # of a kind, from one image to the next, whose message is kept
_UNTOLD = {kind: Skipped(kind, "") for kind in KINDS}  # shared: thousands of them take no room
MAX_HELD_BYTES = 1 << 28  # of encoded images, in a loader process


class Stream(NamedTuple):
    """What the readers of all ranks have in common."""

    shards: Sequence[str]  # paths and URLs
    image_size: int
    micro_batch_size: int
    world_size: int
    seed: int
    start: int  # samples consumed by all ranks before
    shuffle_samples: int  # held by each reader
    augmentation: Augmentation
    decoding: Decoding
    policy: Policy


class _Encoded(NamedTuple):
    data: bytes
    where: str  # shard and key
    key: str


def streamed_batches(
    stream: Stream, rank: int, *, num_workers: int, prefetch_batches: int
) -> Iterator[Batch]:
    """Endless micro batches (B, 3, image_size, image_size) of one rank.

    Raises `ValueError` for a URL that is not to be opened, and `BadSample` as `stream` does; also,
    where the policy skips, if a row of shards gives no sample, or a row of samples no image.
    """
    for shard in stream.shards:
        check_url(shard)
    return load(_Streamed(stream, rank), None, num_workers, prefetch_batches)


class _Streamed(IterableDataset):
    """Micro batches, as lists of items, of one loader process."""

    def __init__(self, stream: Stream, rank: int) -> None:
        self.stream, self.rank = stream, rank

    def __iter__(self) -> Iterator[list[Item]]:
        stream, worker = self.stream, get_worker_info()
        workers, own = (1, 0) if worker is None else (worker.num_workers, worker.id)
        reader = f"{self.rank * workers + own} {stream.world_size * workers}"
        label = f"streaming {stream.seed} {stream.start} {reader}"
        draw = random.Random(xxhash.xxh3_64_intdigest(label.encode()))
        faults = _Faults(stream.policy)
        batch: list[Item] = []
        for encoded in self._shuffled(draw, faults):
            try:
                image = decode_crop(
                    encoded.data,
                    partial(
                        random_crop,
                        augmentation=stream.augmentation,
                        seed=SampleSeed(stream.seed, 0, draw.getrandbits(63)),
                    ),
                    image_size=stream.image_size,
                    decoding=stream.decoding,
                )
            except BadSample as error:
                faults.add(encoded.where, error)
                continue
            batch.append(Item(as_float(image), encoded.key, faults.take()))
            if len(batch) == stream.micro_batch_size:
                yield batch
                batch = []

    def _shuffled(self, draw: random.Random, faults: _Faults) -> Iterator[_Encoded]:
        """Samples without end, each drawn from those that are held."""
        held: list[_Encoded] = []
        num_bytes = 0
        for encoded in self._samples(draw, faults):
            held.append(encoded)
            num_bytes += len(encoded.data)
            while len(held) >= self.stream.shuffle_samples or num_bytes > MAX_HELD_BYTES:
                chosen = draw.randrange(len(held))
                held[chosen], held[-1] = held[-1], held[chosen]
                num_bytes -= len(held[-1].data)
                yield held.pop()

    def _samples(self, draw: random.Random, faults: _Faults) -> Iterator[_Encoded]:
        """The images of shards drawn at random, in the order of each shard."""
        empty_in_a_row = 0
        while empty_in_a_row < EMPTY_SHARDS:
            url = self.stream.shards[draw.randrange(len(self.stream.shards))]
            empty_in_a_row += 1
            try:
                with open_shard(url) as file:
                    for encoded in self._of_shard(url, file, faults):
                        empty_in_a_row = 0
                        yield encoded
            except BrokenTar as error:
                kind = CUT_SHARD if error.is_cut else DAMAGED_SHARD
                faults.add(url, BadSample(str(error), kind))
            except FileNotFoundError as error:
                text = f"the shard cannot be read: {error}"
                faults.add(url, BadSample(text, MISSING_SHARD))
            except OSError as error:
                faults.add(url, BadSample(f"the shard cannot be read: {error}", UNREADABLE))
                time.sleep(min(FIRST_PAUSE * 2 ** (empty_in_a_row - 1), LONGEST_PAUSE))
        last = f"; the last: {faults.last}" if faults.last else ""
        raise BadSample(f"{EMPTY_SHARDS} shards in a row gave no sample{last}", UNREADABLE)

    def _of_shard(self, url: str, file: BinaryIO, faults: _Faults) -> Iterator[_Encoded]:
        names, reader = ImageNames(), ForwardReader(file)
        max_bytes = self.stream.decoding.limits.num_bytes
        for member in read_members(reader):
            try:
                key = names.key_of_image(member)
                if key is None:
                    continue
                if member.size > max_bytes:
                    text = f"{member.size} bytes is over the limit of {max_bytes}"
                    raise BadSample(f"{key!r}: {text}", TOO_LONG)
            except (RefusedMember, BadSample) as error:
                faults.add(url, BadSample(str(error), error.kind))
                continue
            data = reader.read(member.size)
            if len(data) == member.size:  # else the reader raises next
                yield _Encoded(data, f"{url}, sample {key!r}", key)


class _Faults:
    """What could not be used since the last image, in bounded memory."""

    def __init__(self, policy: Policy) -> None:
        self.last = ""
        self._policy = policy
        self._found: list[Skipped] = []
        self._by_kind: Counter[str] = Counter()

    def add(self, where: str, error: BadSample) -> None:
        """Raises `BadSample` where the policy does not skip it, or so many came in a row."""
        self.last = f"{where}: {error}"
        if not self._policy.skips(error.kind):
            raise BadSample(self.last, error.kind) from error
        if len(self._found) >= MOST_FAULTS:
            row = f"{MOST_FAULTS} samples in a row cannot be used"
            raise BadSample(f"{row}; the last: {self.last}", error.kind) from error
        self._by_kind[error.kind] += 1
        is_told = self._by_kind[error.kind] <= TOLD_FAULTS
        self._found.append(Skipped(error.kind, self.last) if is_told else _UNTOLD[error.kind])

    def take(self) -> tuple[Skipped, ...]:
        """All of them, at an image: the row has ended."""
        found = tuple(self._found)
        self._found.clear()
        self._by_kind.clear()
        return found
