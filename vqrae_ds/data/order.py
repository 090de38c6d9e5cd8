"""The order of samples: a pure function of (seed, epoch, number of samples of each shard).

Shards are shuffled over an epoch, and samples within a shard, so that reads stay local. A place in
the order is ONE integer, the samples consumed by all ranks together; what lies there is found in
the time of a bisection, whatever the place. Ranks, workers and micro batches only divide it up.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import xxhash


class Place(NamedTuple):
    """Where a position of the stream falls: which pass over the data, which sample of the index."""

    epoch: int
    sample: int


class SampleOrder:
    """The order of samples for one seed; each comes exactly once an epoch.

    `samples_per_shard` has the shards in the order of their index; some may be empty, not all.
    """

    def __init__(self, samples_per_shard: Sequence[int] | np.ndarray, *, seed: int) -> None:
        self.seed = seed
        self._counts_S = np.asarray(samples_per_shard, dtype=np.int64)
        # Shard s holds the samples _firsts_S[s] .. _firsts_S[s] + _counts_S[s] - 1 of the index.
        self._firsts_S = np.cumsum(self._counts_S) - self._counts_S
        self.num_samples = int(self._counts_S.sum())
        assert self.num_samples > 0, "an order of nothing"
        self._shuffle_shards(epoch=0)

    def sample_at(self, position: int) -> Place:
        """The sample at a position 0, 1, 2, ... of the stream."""
        epoch, position_in_epoch = divmod(position, self.num_samples)
        if epoch != self._epoch:
            self._shuffle_shards(epoch)
        turn = int(np.searchsorted(self._starts_S, position_in_epoch, side="right")) - 1
        shard = int(self._shards_S[turn])
        order = _shuffled(int(self._counts_S[shard]), f"samples {self.seed} {epoch} {shard}")
        within = int(order[position_in_epoch - int(self._starts_S[turn])])
        return Place(epoch, int(self._firsts_S[shard]) + within)

    def replacement(self, place: Place, attempt: int) -> int:
        """A sample in the place of one that cannot be used; another one at each `attempt`.

        It depends on the seed and on the place alone, so that a run that resumes, with whatever
        number of ranks and workers, replaces by the same one.
        """
        label = f"replacement {self.seed} {place.epoch} {place.sample} {attempt}"
        return xxhash.xxh3_64_intdigest(label.encode()) % self.num_samples

    def _shuffle_shards(self, epoch: int) -> None:
        self._epoch = epoch
        self._shards_S = _shuffled(len(self._counts_S), f"shards {self.seed} {epoch}")
        # The shard whose turn is t fills the positions from _starts_S[t] on.
        counts_S = self._counts_S[self._shards_S]
        self._starts_S = np.cumsum(counts_S) - counts_S


def micro_batch_positions(
    *, micro_batch_size: int, rank: int, world_size: int, start: int
) -> Iterator[range]:
    """The positions of one rank's micro batches, without end, from the position `start` on."""
    for m in itertools.count():
        first = start + (m * world_size + rank) * micro_batch_size
        yield range(first, first + micro_batch_size)


@lru_cache(maxsize=8)
def _shuffled(count: int, label: str) -> np.ndarray:
    """The numbers 0 .. count - 1 in a random order set by the arguments alone, int64 (count,).

    It sorts random 64-bit words: numpy promises that a bit generator's raw words stay the same in
    every version, but not what `permutation` returns, and a run must not resume in another order.
    """
    words = np.random.Philox(key=xxhash.xxh3_128_intdigest(label.encode())).random_raw(count)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False  # it is shared by all who ask
    return order
