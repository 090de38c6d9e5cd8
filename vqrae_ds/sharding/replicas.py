"""Keeps the same on all ranks of a tensor-parallel group what each has whole, and trains by itself.

The ranks see the same images and take the same steps, but a GPU adds up in the order in which its
blocks happen to finish (the backward of attention and of convolutions), and Adam makes full steps
of a gradient that is nothing but rounding. Unequal encoders would in time give the ranks of a group
different features of one image, of which each computes a slice of the same layer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from vqrae_ds.sharding import partitions

CHUNK = 1 << 26  # elements that are sent together


@torch.no_grad()
def equalize(engine: Any) -> float:
    """Give all ranks what the first of their tensor-parallel group has; every rank calls it.

    That is masters, and what the optimizer keeps of them, of the parameters that no group divides.
    Between two steps only. Returns the largest difference of a weight that there was.
    """
    if engine.mpu is None:
        return 0.0
    partitions.prepare_loading(engine)
    engine.module.vqrae.quantizer.forget_codes()
    worst = torch.zeros((), device=engine.device)
    groups, states = partitions.parameter_groups(engine), partitions.optimizer_state(engine)
    for vector, group, state in zip(partitions.stepped(engine), groups, states, strict=True):
        if not group.get("split"):
            worst = torch.maximum(worst, _take_from_first(vector.detach(), engine))
            for kept in state.values():
                if isinstance(kept, Tensor) and kept.numel() == vector.numel():
                    _take_from_first(kept, engine)
    partitions.publish_masters(engine)
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    return worst.item()


def _take_from_first(vector: Tensor, engine: Any) -> Tensor:
    """Overwrite a flat vector by that of the group's first rank. The largest difference."""
    worst = torch.zeros((), device=engine.device)
    for own in vector.split(CHUNK):
        mine = own.to(engine.device)  # an offloaded one goes by the GPU, as the peers are there
        first = mine.clone()
        dist.broadcast(first, group=engine.mpu.get_model_parallel_group(), group_src=0)
        if len(own):
            difference = (first - mine).nan_to_num()  # DeepSpeed's padding may hold anything
            worst = torch.maximum(worst, difference.abs().amax().float())
        own.copy_(first)
    return worst
