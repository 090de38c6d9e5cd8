"""Which tensors a tensor-parallel group divides, along which dimension, and who holds what.

The plan is Megatron's (arXiv:1909.08053, section 3): of a pair of linear layers the first is cut by
its outputs, so that each rank has whole heads or whole hidden units, and the second by its inputs.
Beside the decoder's blocks the frozen codebook is cut, by codes. All else is whole on every rank.

Nothing here communicates: the conversion of checkpoints reads the same plan.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Place(NamedTuple):
    """One rank of a tensor-parallel group of `size`."""

    rank: int
    size: int


ALONE = Place(0, 1)


class Split(NamedTuple):
    """A tensor is cut along `dim`, each of its `parts` equal parts (q, k and v) by itself."""

    dim: int
    parts: int = 1


class Span(NamedTuple):
    """`numel` elements of a flat tensor from `start` on."""

    start: int
    numel: int


class Segment(NamedTuple):
    """A stretch of a whole tensor, flat, that `rank` has at `start` of its own slice, flat."""

    rank: int
    start: int
    numel: int


COLUMN, ROW, QKV = Split(0), Split(1), Split(0, parts=3)

_PLAN = {
    r"decoder\.blocks\.\d+\.attention\.qkv\.(weight|bias)": QKV,
    r"decoder\.blocks\.\d+\.attention\.proj\.weight": ROW,
    r"decoder\.blocks\.\d+\.mlp\.fc1\.(weight|bias)": COLUMN,
    r"decoder\.blocks\.\d+\.mlp\.fc2\.weight": ROW,
    r"quantizer\.embedding\.weight": COLUMN,
}


def split_of(name: str) -> Split | None:
    """How a tensor of this name in the generator is cut; None for one that every rank has whole."""
    name = name.removeprefix("vqrae.")
    return next((split for names, split in _PLAN.items() if re.fullmatch(names, name)), None)


def bounds(length: int, place: Place) -> Span:
    """Which of `length` things a rank holds: the first `length % size` ranks have one more."""
    share, rest = divmod(length, place.size)
    start = place.rank * share + min(place.rank, rest)
    return Span(start, share + (place.rank < rest))


def own_shape(shape: Sequence[int], split: Split, place: Place) -> tuple[int, ...]:
    """The shape of one rank's slice of a tensor of `shape`."""
    sizes = list(shape)
    sizes[split.dim] = split.parts * bounds(sizes[split.dim] // split.parts, place).numel
    return tuple(sizes)


def own_slice(whole: Tensor, split: Split, place: Place) -> Tensor:
    """One rank's slice of a whole tensor."""
    start, numel = bounds(whole.shape[split.dim] // split.parts, place)
    parts = [part.narrow(split.dim, start, numel) for part in whole.chunk(split.parts, split.dim)]
    return parts[0] if split.parts == 1 else torch.cat(parts, split.dim)


def merge(slices: Sequence[Tensor], split: Split) -> Tensor:
    """The whole tensor from the slices of all ranks, in their order."""
    by_rank = [piece.chunk(split.parts, split.dim) for piece in slices]
    return torch.cat([piece for part in zip(*by_rank, strict=True) for piece in part], split.dim)


def segments(shape: Sequence[int], split: Split, size: int) -> Iterator[Segment]:
    """The whole flat tensor of `shape` from end to end, as stretches of the slices of its ranks."""
    length = shape[split.dim] // split.parts
    row = torch.Size(shape[split.dim + 1 :]).numel()  # elements that no cut divides
    numels = [bounds(length, Place(rank, size)).numel * row for rank in range(size)]
    starts = [0] * size
    for _ in range(torch.Size(shape[: split.dim]).numel() * split.parts):
        for rank, numel in enumerate(numels):
            yield Segment(rank, starts[rank], numel)
            starts[rank] += numel
