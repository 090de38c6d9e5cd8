"""A tensor that lies in slices, one a tensor rank, read as if it were whole."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from vqrae_ds.conversion.rank_slice import RankSlice, Span, TensorInfo
from vqrae_ds.parallel.slices import Place, Split, own_shape, segments


class MergedSpans:
    """The spans of a whole tensor of `shape` in the order of its elements, made as they are read.

    A tensor that is cut by its inputs has as many as rows times ranks.
    """

    def __init__(
        self, by_rank: Sequence[Sequence[Span]], shape: tuple[int, ...], split: Split
    ) -> None:
        self._by_rank = [_Cutter(spans) for spans in by_rank]
        self._shape, self._split = shape, split

    def __iter__(self) -> Iterator[Span]:
        for rank, start, numel in segments(self._shape, self._split, len(self._by_rank)):
            yield from self._by_rank[rank].cut(start, numel)


class _Cutter:
    """Stretches of a flat tensor that lies in several spans."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._spans = [span for span in spans if span.numel]
        self._starts = list(itertools.accumulate((s.numel for s in self._spans), initial=0))

    def cut(self, start: int, numel: int) -> Iterator[Span]:
        index = bisect.bisect_right(self._starts, start) - 1
        while numel > 0:
            span, inside = self._spans[index], start - self._starts[index]
            taken = min(numel, span.numel - inside)
            yield Span(span.tensor, span.start + inside, taken)
            start, numel, index = start + taken, numel - taken, index + 1


def merged_info(name: str, slices: Sequence[RankSlice], split: Split, folder: Path) -> TensorInfo:
    """What the whole tensor is. Raises `ValueError` where the slices are not those of one."""
    infos = [each.tensors[name] for each in slices]
    shape = list(infos[0].shape)
    shape[split.dim] = sum(info.shape[split.dim] for info in infos)
    for rank, info in enumerate(infos):
        expected = own_shape(shape, split, Place(rank, len(infos)))
        if info.shape != expected or info[1:] != infos[0][1:]:
            raise ValueError(
                f"{folder}: tensor rank {rank} holds {name} as {info.shape} in {info.dtype}, not "
                f"{expected} in {infos[0].dtype}"
            )
    return infos[0]._replace(shape=tuple(shape))
