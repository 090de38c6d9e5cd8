"""The first images of a set that is spread over ranks: the same ones whatever their number.

Shapes: B batch, S images that are shown, H x W pixels.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vqrae_ds.data.stream import EvaluationBatch
from vqrae_ds.ranks import gather


class Pictures(NamedTuple):
    """Images and their reconstructions, in [0, 1], in the order of the index."""

    images_S3HW: Tensor
    images_hat_S3HW: Tensor


class FirstImages:
    """Keeps up to `number` images of this rank with their reconstructions, on their device."""

    def __init__(self, number: int) -> None:
        self.number = number
        self._kept: dict[int, Tensor] = {}  # (2, 3, H, W) by the place in the index
        self._empty = torch.zeros(0)  # (0, 2, 3, H, W) after a batch: a rank may keep no image

    def add(self, batch: EvaluationBatch, images_B3HW: Tensor, images_hat_B3HW: Tensor) -> None:
        """Look at the next batch of this rank, of which fillers and bad samples are passed over."""
        self._empty = images_B3HW.new_zeros(0, 2, *images_B3HW.shape[1:])
        for place in batch.is_real_B.nonzero().flatten().tolist():
            if len(self._kept) == self.number:
                break
            pair_23HW = torch.stack([images_B3HW[place], images_hat_B3HW[place]])
            self._kept[int(batch.numbers_B[place])] = pair_23HW

    def of_all_ranks(self) -> Pictures:
        """The first images of the set, on every rank; all of them call it, after a batch."""
        # Ranks of a tensor-parallel group hold the same images: each of them gives its share.
        holders = Counter(number for theirs in gather(list(self._kept)) for number in theirs)
        chosen = sorted(holders)[: self.number]
        pairs_S23HW = self._empty.new_zeros(len(chosen), *self._empty.shape[1:])
        for place, number in enumerate(chosen):
            if number in self._kept:
                pairs_S23HW[place] = self._kept[number] / holders[number]
        # A sum is as large on 512 ranks as on one, where gathered images would be 512 times that.
        dist.all_reduce(pairs_S23HW)
        return Pictures(*pairs_S23HW.unbind(1))
