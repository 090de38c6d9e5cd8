"""A model on a whole set, spread over ranks: the same numbers whatever their number.

Batches are pieces of the index that do not depend on the number of ranks, which take turns. The
first rank puts what they found together in the order of the index, so that sums are made of the
same terms in the same order: equal to the last bit on one kind of machine with as many threads a
rank. What fills up the last batches, and bad samples, count nowhere.

Shapes: n images, N tokens, K codes, D encoder width.
"""

from __future__ import annotations

import logging
import time
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vqrae_ds.config import DataConfig
from vqrae_ds.data.index import ShardIndex
from vqrae_ds.data.opening import Reader, open_evaluation
from vqrae_ds.evaluation.frechet import Moments, frechet_distance
from vqrae_ds.evaluation.measuring import Instruments, Measured, measure
from vqrae_ds.ranks import failing_together

logger = logging.getLogger(__name__)

# Neighbours are sought among so many images, spread evenly over the set: their number is squared.
MOST_FEATURES = 10_000
_SECONDS_BETWEEN_LINES = 10.0


class SetFigures(NamedTuple):
    """All of the set, in the order of the index; tensors on the CPU.

    `figures` are those of each image by name, float64. `pooled` are features of the images at
    `pooled_numbers`, by whose they are. `frechet` is the distance of the Inception features.
    """

    numbers_n: Tensor  # positions in the index
    figures: dict[str, Tensor]
    num_same: int  # reconstructed without any error
    counts_K: Tensor  # int64, how often each code was used
    tokens: int  # an image
    pooled_numbers_m: Tensor
    pooled: dict[str, Tensor]
    frechet: float | None
    num_left_out: int  # bad samples


def measure_set(
    instruments: Instruments,
    index: ShardIndex,
    data: DataConfig,
    reader: Reader,
    *,
    image_size: int,
    batch_size: int,
    num_images: int | None = None,
) -> SetFigures | None:
    """Every rank calls it; the first gets the figures, the others None.

    The first `num_images` images of the index count, by default all. What fails on one rank is
    raised on all of them.
    """
    limit = min(num_images or index.num_samples, index.num_samples)
    num_rounds = -(-limit // (batch_size * reader.world_size))
    batches = open_evaluation(index, data, reader, image_size=image_size, batch_size=batch_size)
    gathered = _Gathered(instruments, limit) if reader.rank == 0 else None
    with torch.no_grad():
        for turn in range(num_rounds):
            with failing_together():
                mine = measure(instruments, next(batches), limit)
            pieces = [None] * reader.world_size if gathered is not None else None
            dist.gather_object(mine, pieces)
            with failing_together():
                if gathered is not None:
                    for piece in pieces:
                        gathered.add(piece)
                    gathered.show_progress(is_last=turn == num_rounds - 1)
    with failing_together():
        return None if gathered is None else gathered.finish()


class _Gathered:
    """What has come in, in the order of the index."""

    def __init__(self, instruments: Instruments, limit: int) -> None:
        self.limit, self.stride = limit, -(-limit // MOST_FEATURES)
        self.numbers: list[Tensor] = []
        self.figures: dict[str, list[Tensor]] = {}
        self.pooled: dict[str, list[Tensor]] = {}
        self.pooled_numbers: list[Tensor] = []
        codes = instruments.model.config.num_embeddings
        self.counts_K = torch.zeros(codes, dtype=torch.int64)
        self.num_same, self.tokens, self.num_found = 0, 0, 0
        self.moments = None
        if instruments.inception is not None:
            self.moments = Moments(), Moments()
        self.start = self.last_line = time.monotonic()

    def add(self, piece: Measured) -> None:
        self.numbers.append(piece.numbers_n)
        self.num_found += len(piece.numbers_n)
        for name, values_n in piece.figures.items():
            self.figures.setdefault(name, []).append(values_n)
        self.num_same += int(piece.is_same_n.sum())
        self.counts_K += piece.indices_nN.flatten().bincount(minlength=len(self.counts_K))
        self.tokens = piece.indices_nN.shape[1]
        is_kept_n = piece.numbers_n % self.stride == 0
        self.pooled_numbers.append(piece.numbers_n[is_kept_n])
        for name, pooled_nD in piece.pooled.items():
            self.pooled.setdefault(name, []).append(pooled_nD[is_kept_n])
        if self.moments is not None:
            for moments, rows_nF in zip(self.moments, piece.inception, strict=True):
                moments.add(rows_nF)

    def show_progress(self, *, is_last: bool) -> None:
        now = time.monotonic()
        if is_last or now - self.last_line >= _SECONDS_BETWEEN_LINES:
            self.last_line = now
            rate = self.num_found / max(now - self.start, 1e-9)
            logger.info("%d of %d images, %.3g images/s", self.num_found, self.limit, rate)

    def finish(self) -> SetFigures:
        """Raises `ValueError` where not one image could be used."""
        if not self.num_found:
            raise ValueError(f"not one of {self.limit} images of the set can be used")
        frechet = None
        if self.moments is not None and self.num_found > 1:
            frechet = frechet_distance(*self.moments)
        return SetFigures(
            numbers_n=torch.cat(self.numbers),
            figures={name: torch.cat(parts) for name, parts in self.figures.items()},
            num_same=self.num_same,
            counts_K=self.counts_K,
            tokens=self.tokens,
            pooled_numbers_m=torch.cat(self.pooled_numbers),
            pooled={name: torch.cat(parts) for name, parts in self.pooled.items()},
            frechet=frechet,
            num_left_out=self.limit - self.num_found,
        )
