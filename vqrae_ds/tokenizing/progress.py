"""One line now and then: how far the job is, how fast this rank and all are, the time left.

Ranks do not talk. What the others have done is seen in the folder, in whole shards; what this one
has done is known to the image.
"""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from pathlib import Path

import numpy as np

from vqrae_ds.tokenizing.folder import finished_shards

logger = logging.getLogger(__name__)

EVERY_SECONDS = 30.0


class Progress:
    """Of one rank; `samples_S` are the samples of each shard."""

    def __init__(self, output: Path, samples_S: np.ndarray) -> None:
        self._output, self._samples_S = output, samples_S
        self._start = self._last = time.monotonic()
        self._there_at_start = self._files()
        self._begun: set[int] = set()  # a file of theirs is damaged, or is to become a better one
        self._images = 0  # that this rank has been through, those that were skipped with them
        self._open = 0  # of these, in the shard that is encoded

    def begin(self, shard: int) -> None:
        """The rank has claimed a shard. What lies under its name counts no longer."""
        self._begun.add(shard)
        self._there_at_start.discard(shard)

    def add(self, images: int) -> None:
        """The rank is through some more images of its shard; says so where it is time."""
        self._images += images
        self._open += images
        if time.monotonic() - self._last >= EVERY_SECONDS:
            self._last = time.monotonic()
            logger.info("%s", self.line())

    def shard_done(self, shard: int) -> None:
        """The shard is in the folder."""
        self._begun.discard(shard)
        self._open = 0

    def line(self) -> str:
        """Images done of all, images/s of this rank and of all, time left."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        done = self._samples(self._files() - self._begun) + self._open
        total = int(self._samples_S.sum())
        own = self._images / seconds
        rate = max((done - self._samples(self._there_at_start)) / seconds, own)
        left = str(timedelta(seconds=round((total - done) / rate))) if rate else "unknown"
        return (
            f"{done} of {total} images | {own:.1f} images/s by this rank, {rate:.1f} by all | "
            f"{left} left"
        )

    def _files(self) -> set[int]:
        return {n for n in finished_shards(self._output) if n < len(self._samples_S)}

    def _samples(self, shards: set[int]) -> int:
        return int(self._samples_S[list(shards)].sum())
