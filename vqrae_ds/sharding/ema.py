"""A moving average of the trained weights, kept beside the fp32 masters: each rank its share.

Polyak averaging (Polyak and Juditsky, 1992) in its exponential form. Over the partitions of ZeRO it
costs 4 bytes a trained parameter, divided by the ranks, and no communication.
`tools/convert_checkpoint.py --ema` puts the average in the place of the masters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vqrae_ds.conversion.rank_files import AVERAGES
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint
from vqrae_ds.sharding.loading import fill
from vqrae_ds.sharding.partitions import layout, masters


class WeightAverage:
    """average = decay * average + (1 - decay) * weight, from the weights at construction on.

    `engine` is a DeepSpeed engine under ZeRO. The averages lie where its masters do, in fp32 even
    beside masters in bf16, which would lose what a step changes of them.
    """

    def __init__(self, engine: Any, decay: float) -> None:
        self.decay = decay
        self._engine = engine
        self._averages = [m.to(torch.float32, copy=True) for m in masters(engine)]

    @torch.no_grad()
    def update(self) -> None:
        """Follow the weights; call it after each step that was taken, and after no other."""
        for average, master in zip(self._averages, masters(self._engine), strict=True):
            average.lerp_(master.float(), 1 - self.decay)  # one by one: a cast needs memory

    def state_dict(self) -> dict[str, list[Tensor]]:
        """This rank's averages, in the order and lengths of `partitions.masters`; not copied."""
        return {AVERAGES: self._averages}

    def load(self, averages: ZeroCheckpoint) -> None:
        """Take over this rank's share of the averages, over however many ranks they were kept."""
        for mine, parts in zip(self._averages, layout(self._engine), strict=True):
            fill(mine, parts, averages)
