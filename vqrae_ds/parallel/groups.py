"""The process groups of dp x tp ranks. Neighbours share a tensor-parallel group.

    ranks 0..5 at tp 2:   tensor groups (0 1) (2 3) (4 5),   data groups (0 2 4) (1 3 5)

Neighbours sit in one node, where the many small all-reduces of a tensor group are cheap. All of
them see the same images; ZeRO partitions over the data group.
"""

from __future__ import annotations

import functools
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vqrae_ds.parallel.slices import Place, Split, merge, own_shape


class Groups(NamedTuple):
    """This rank's two groups. The methods are those that DeepSpeed asks of its `mpu`."""

    tensor_group: dist.ProcessGroup
    data_group: dist.ProcessGroup

    @property
    def place(self) -> Place:
        """This rank in its tensor group."""
        return Place(dist.get_rank(self.tensor_group), dist.get_world_size(self.tensor_group))

    def get_model_parallel_rank(self) -> int:
        return self.place.rank

    def get_model_parallel_world_size(self) -> int:
        return self.place.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor_group

    def get_tensor_model_parallel_rank(self) -> int:
        return self.place.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.place.size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor_group

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data_group)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.data_group)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data_group


@functools.cache
def make_data_groups(timeout: timedelta) -> Groups:
    """Each rank a tensor group of its own, for a model that no group divides beside one that is.

    DeepSpeed would take the groups of that one, which it keeps in a global. The groups are made
    once a process; a peer that is gone ends a collective after `timeout`.
    """
    alone = dist.new_group([dist.get_rank()], timeout, use_local_synchronization=True)
    return Groups(alone, dist.group.WORLD)


def merge_over_group(own: Tensor, shape: tuple[int, ...], split: Split, groups: Groups) -> Tensor:
    """The whole tensor of `shape` on every rank of the tensor group, which call it together."""
    slices, (rank, size) = [], groups.place
    for other in range(size):
        piece = own.contiguous()
        if other != rank:
            piece = own.new_empty(own_shape(shape, split, Place(other, size)))
        dist.broadcast(piece, group=groups.tensor_group, group_src=other)
        slices.append(piece)
    return merge(slices, split)


class Ranks(NamedTuple):
    """This process among its peers, `tensor_size` neighbours of which see the same images."""

    rank: int
    world_size: int
    device: torch.device
    tensor_size: int = 1

    @property
    def data_rank(self) -> int:
        """Which share of the data this rank sees, of `data_size`."""
        return self.rank // self.tensor_size

    @property
    def data_size(self) -> int:
        """How many ranks, or groups of ranks, see different images."""
        return self.world_size // self.tensor_size


@functools.cache
def make_groups(tensor_size: int, timeout: timedelta) -> Groups | None:
    """The groups of this rank, None where each rank is a tensor group of its own.

    All ranks call it together; the groups are made once a process. `tensor_size` divides the ranks.
    A peer that is gone ends a collective after `timeout`.
    """
    if tensor_size == 1:
        return None
    world_size, rank = dist.get_world_size(), dist.get_rank()
    assert world_size % tensor_size == 0, "the batch arithmetic refuses it"
    firsts, columns = range(0, world_size, tensor_size), range(tensor_size)
    neighbours = [list(range(first, first + tensor_size)) for first in firsts]
    strided = [list(range(column, world_size, tensor_size)) for column in columns]
    tensor = [dist.new_group(ranks, timeout) for ranks in neighbours]
    data = [dist.new_group(ranks, timeout) for ranks in strided]
    return Groups(tensor[rank // tensor_size], data[rank % tensor_size])
