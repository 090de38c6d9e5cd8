"""Ranks of a tensor-parallel group read the same images, each for itself: that they do is checked.

They would train on halves of different images, without a word, where one of them alone had to pass
over a sample.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
import xxhash

from vqrae_ds.data.failure import DataFailed
from vqrae_ds.data.loader import Batch


class Twins:
    """The ranks of `group`, which are neighbours, and what this one of them has read."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self._device = group, device
        self._digest = xxhash.xxh3_64()  # of the keys of all batches, in their order

    def noting(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """`batches`, noted as they are taken."""
        for batch in batches:
            self._digest.update("\0".join([*batch.keys, ""]).encode())
            yield batch

    def check(self) -> None:
        """All ranks of the group call it, after as many batches; it costs one small all-gather.

        Raises `DataFailed` on all of them where one has read other images than the first.
        """
        own = torch.tensor([self._digest.intdigest() - (1 << 63)], device=self._device)
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(self._group))]
        dist.all_gather(everyone, own, group=self._group)
        ranks = dist.get_process_group_ranks(self._group)
        first, *others = (digest.item() for digest in everyone)
        strays = [str(r) for r, digest in zip(ranks[1:], others, strict=True) if digest != first]
        if strays:
            raise DataFailed(
                f"rank {', '.join(strays)}: it has read other images than rank {ranks[0]} of its "
                "tensor-parallel group, and they have trained on both: see which shards it cannot "
                "read; the same command goes on from the last checkpoint"
            )
