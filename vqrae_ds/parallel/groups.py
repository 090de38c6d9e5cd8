"""The process groups of dp x tp ranks. Neighbours share a tensor-parallel group.

    ranks 0..5 at tp 2:   tensor groups (0 1) (2 3) (4 5),   data groups (0 2 4) (1 3 5)

Neighbours sit in one node, where the many small all-reduces of a tensor group are cheap. All of
them see the same images; ZeRO partitions over the data group.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from vqrae_ds.parallel.slices import Place, Split, merge, own_shape


class Groups(NamedTuple):
    """This rank's two groups. The methods are those that DeepSpeed asks of its `mpu`."""

    tensor: dist.ProcessGroup
    data: dist.ProcessGroup

    @property
    def place(self) -> Place:
        """This rank in its tensor group."""
        return Place(dist.get_rank(self.tensor), dist.get_world_size(self.tensor))

    def get_model_parallel_rank(self) -> int:
        return self.place.rank

    def get_model_parallel_world_size(self) -> int:
        return self.place.size

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor

    def get_tensor_model_parallel_rank(self) -> int:
        return self.place.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self.place.size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        return self.tensor

    def get_data_parallel_rank(self) -> int:
        return dist.get_rank(self.data)

    def get_data_parallel_world_size(self) -> int:
        return dist.get_world_size(self.data)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.data


@functools.cache
def make_data_groups() -> Groups:
    """Each rank a tensor group of its own, for a model that no group divides beside one that is.

    All ranks call it together; the groups are made once a process.
    """
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    return Groups(alone[dist.get_rank()], dist.group.WORLD)


def merge_over_group(own: Tensor, shape: tuple[int, ...], split: Split, groups: Groups) -> Tensor:
    """The whole tensor of `shape` on every rank of the tensor group, which call it together."""
    slices, (rank, size) = [], groups.place
    for other in range(size):
        piece = own.contiguous()
        if other != rank:
            piece = own.new_empty(own_shape(shape, split, Place(other, size)))
        dist.broadcast(piece, group=groups.tensor, group_src=other)
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
def make_groups(tensor_size: int) -> Groups | None:
    """The groups of this rank, None where each rank is a tensor group of its own.

    All ranks call it together; the groups are made once a process. `tensor_size` divides the ranks.
    """
    if tensor_size == 1:
        return None
    world_size, rank = dist.get_world_size(), dist.get_rank()
    assert world_size % tensor_size == 0, "the batch arithmetic refuses it"
    firsts = range(0, world_size, tensor_size)
    tensor = [dist.new_group(list(range(first, first + tensor_size))) for first in firsts]
    columns = range(tensor_size)
    data = [dist.new_group(list(range(column, world_size, tensor_size))) for column in columns]
    return Groups(tensor[rank // tensor_size], data[rank % tensor_size])
