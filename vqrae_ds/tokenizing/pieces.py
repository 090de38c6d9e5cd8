"""The images of shards in pieces of one batch, decoded ahead by worker processes.

A piece lies in one shard, so that the batches of a shard are the same whoever tokenizes it. The
view is that of an evaluation: the largest centre square, decoded exactly.
Suffixes: B samples of a piece that could be used, 3 channels, S side of the square.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from vqrae_ds.data.crops import Crop, centre_crop
from vqrae_ds.data.decode import Decoding, decode_sample
from vqrae_ds.data.faults import BadSample
from vqrae_ds.data.index import ShardIndex
from vqrae_ds.data.loader import read_ahead
from vqrae_ds.tokenizing.code_shard import SkippedSample


class Piece(NamedTuple):
    """The samples `first` .. `end` - 1 of a shard; `is_last` where there are no more of them."""

    shard: int
    first: int
    end: int
    is_last: bool


class DecodedPiece(NamedTuple):
    """A piece's images that could be used, and those that could not."""

    piece: Piece
    images_B3SS: Tensor  # float32 in [0, 1]
    numbers: list[int]  # places in the shard
    keys: list[str]
    crops: list[list[int]]  # width, height, left, top, side in pixels of the upright image
    skipped: list[SkippedSample]


def pieces_of(shards: Iterable[int], index: ShardIndex, batch_size: int) -> Iterator[Piece]:
    """The pieces of some shards in their order; of a shard without samples one that is empty."""
    for shard in shards:
        count = index.shards[shard].num_samples
        for first in range(0, max(count, 1), batch_size):
            end = min(first + batch_size, count)
            yield Piece(shard, first, end, is_last=end == count)


def decoded_pieces(
    pieces: Iterable[Piece],
    index: ShardIndex,
    *,
    image_size: int,
    decoding: Decoding,
    skip_bad: bool,
    num_workers: int,
    prefetch_batches: int,
) -> Iterator[DecodedPiece]:
    """`pieces` in their order, asked for as far ahead as the workers are.

    Raises `BadSample` naming shard and key at an image that cannot be used, unless `skip_bad`.
    """
    samples = _Pieces(index, image_size, decoding, skip_bad)
    how = {"sampler": pieces, "batch_size": None, "collate_fn": _as_it_is}
    return read_ahead(samples, num_workers, prefetch_batches, **how)


class _Pieces(Dataset):
    def __init__(
        self, index: ShardIndex, image_size: int, decoding: Decoding, skip_bad: bool
    ) -> None:
        self.index, self.image_size = index, image_size
        self.decoding, self.skip_bad = decoding, skip_bad

    def __getitem__(self, piece: Piece) -> DecodedPiece:
        images, numbers, keys, crops, skipped = [], [], [], [], []
        start = int(self.index.starts[piece.shard])
        for number in range(piece.first, piece.end):
            sample = self.index.sample(start + number)
            view = _NotedCrop()
            try:
                image_3SS = decode_sample(
                    sample, view, image_size=self.image_size, decoding=self.decoding
                )
            except BadSample as error:
                if not self.skip_bad:
                    raise
                skipped.append(SkippedSample(number, sample.key, error.kind))
                continue
            images.append(image_3SS)
            numbers.append(number)
            keys.append(sample.key)
            crops.append(view.noted)
        empty_03SS = torch.empty(0, 3, self.image_size, self.image_size)
        images_B3SS = torch.stack(images) if images else empty_03SS
        return DecodedPiece(piece, images_B3SS, numbers, keys, crops, skipped)


class _NotedCrop:
    """The centre crop, which remembers what it was asked and what it said."""

    noted: list[int]

    def __call__(self, width: int, height: int) -> Crop:
        crop = centre_crop(width, height)
        self.noted = [width, height, crop.left, crop.top, crop.side]
        return crop


def _as_it_is(piece: DecodedPiece) -> DecodedPiece:
    return piece
