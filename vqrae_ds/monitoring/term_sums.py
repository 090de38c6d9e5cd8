"""Sums of what a window of steps measured: kept on the device, then added over ranks in one go.

T terms of one micro batch, W ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# Lengths are rounded up to this, so that ranks that disagree still meet in the same reduction
# (all but always: one in hundreds of disagreements crosses a multiple) and can say so.
PADDING = 1024


class TermMean(NamedTuple):
    """The mean over the `count` finite values of all ranks, and how many were not finite.

    Ranks of a tensor-parallel group, which have the same values, count each.
    """

    mean: float  # NaN where none was finite
    count: int
    num_nonfinite: int


class SumsOverRanks(NamedTuple):
    """What `sum_over_ranks` gives, on the CPU in fp64."""

    sums: dict[str, Tensor]
    own_WN: Tensor  # the numbers that each rank gave


class _Sums(NamedTuple):
    """Of all micro batches with the same names."""

    total_T: Tensor  # of the finite values
    finite_T: Tensor  # how many those are
    micro_batches: int


class TermSums:
    """Terms by name, added up without reading anything back from the device.

    A step that is skipped may bring values that are not finite: they are counted, not added.
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, ...], _Sums] = {}

    def add(self, terms: Mapping[str, Tensor]) -> None:
        """Add the scalars of one micro batch. A name may be there in some of them only."""
        if not terms:
            return
        names = tuple(sorted(terms))
        values_T = torch.stack([terms[name].detach().double() for name in names])
        finite_T = values_T.isfinite()
        finite_values_T = torch.where(finite_T, values_T, 0.0)
        total_T, number_T, micro_batches = self._sums.get(names, _Sums(0.0, 0.0, 0))
        self._sums[names] = _Sums(
            total_T + finite_values_T, number_T + finite_T.double(), micro_batches + 1
        )

    def vectors(self) -> dict[str, Tensor]:
        """What `sum_over_ranks` is to add up: a vector (2 T,) for each set of names."""
        return {
            ",".join(names): torch.cat([sums.total_T, sums.finite_T])
            for names, sums in sorted(self._sums.items())
        }

    def means(self, vectors: Mapping[str, Tensor]) -> dict[str, TermMean]:
        """The mean of each term from the added vectors; sums of other things are passed over."""
        totals: dict[str, list[float]] = {}  # name -> sum, number of finite and of all values
        for names, sums in self._sums.items():
            total_T, finite_T = vectors[",".join(names)].chunk(2)
            all_values = sums.micro_batches * dist.get_world_size()
            for name, *own in zip(names, total_T.tolist(), finite_T.tolist(), strict=True):
                known = totals.setdefault(name, [0.0, 0.0, 0.0])
                totals[name] = [a + b for a, b in zip(known, [*own, all_values], strict=True)]
        return {
            name: TermMean(total / finite if finite else float("nan"), int(finite), int(n - finite))
            for name, (total, finite, n) in sorted(totals.items())
        }

    def clear(self) -> None:
        """Begin the next window."""
        self._sums.clear()


def sum_over_ranks(vectors: Mapping[str, Tensor], own: Sequence[float | Tensor]) -> SumsOverRanks:
    """Add up vectors by name, and show the numbers `own` of every rank to all: one reduction.

    Every rank calls it with the same names and lengths; where not, all of them raise.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    parts = [vector.double() for vector in vectors.values()]
    layout = " ".join(f"{name}:{len(vector)}" for name, vector in vectors.items())
    head = zlib.crc32(f"{layout} own:{len(own)}".encode())
    numbers = {"dtype": torch.float64, "device": parts[0].device}
    table_WN = torch.zeros(world_size, 1 + len(own), **numbers)
    # A row a rank, the others zero: their sum is a gather, and its head tells who disagrees.
    table_WN[rank] = torch.stack([torch.as_tensor(number, **numbers) for number in (head, *own)])
    fused = torch.cat([table_WN.flatten(), *parts])
    fused = F.pad(fused, (0, -len(fused) % PADDING))
    dist.all_reduce(fused)
    fused = fused.cpu()
    sizes = [table_WN.numel(), *(len(part) for part in parts)]
    table, *sums = fused[: sum(sizes)].split(sizes)
    table_WN = table.view_as(table_WN)
    differing = (table_WN[:, 0] != table_WN[0, 0]).nonzero().flatten().tolist()
    assert not differing, f"ranks {differing} differ from rank 0 in what they add; here: {layout}"
    return SumsOverRanks(dict(zip(vectors, sums, strict=True)), table_WN[:, 1:])
