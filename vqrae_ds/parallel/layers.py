"""Linear layers of which each rank of a tensor-parallel group holds a slice.

A pair works without communication between its two layers: `ColumnLinear` takes the same input on
all ranks and gives each its own outputs, `RowLinear` takes these and adds up over the ranks
(Megatron-LM, arXiv:1909.08053, section 3, where the two collectives are called f and g).

Shapes: I inputs and O outputs of the whole layer; i and o are those of a rank.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vqrae_ds.models.decoder import Layers
from vqrae_ds.parallel.groups import Groups
from vqrae_ds.parallel.marks import mark_split
from vqrae_ds.parallel.slices import COLUMN, QKV, ROW, Split, own_shape, own_slice


def sliced_layers(groups: Groups) -> Layers:
    """What the decoder's blocks are made of on a rank of a tensor-parallel group."""
    return Layers(
        qkv=functools.partial(ColumnLinear, groups=groups, split=QKV),
        column=functools.partial(ColumnLinear, groups=groups),
        row=functools.partial(RowLinear, groups=groups),
        head_norm=functools.partial(HeadNorm, groups=groups),
    )


class SlicedLinear(nn.Linear):
    """What both layers share: the first values are slices of those that one process would draw."""

    def __init__(self, in_features: int, out_features: int, groups: Groups, split: Split) -> None:
        self.whole_shape, self.split = (out_features, in_features), split
        self.groups = groups
        o, i = own_shape(self.whole_shape, split, groups.place)
        super().__init__(i, o)
        mark_split(self.weight, self.whole_shape)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As `nn.Linear` draws the whole layer; every rank needs the same random state."""
        weight_OI = self.weight.new_empty(self.whole_shape)
        nn.init.kaiming_uniform_(weight_OI, a=5**0.5)
        self.weight.copy_(own_slice(weight_OI, self.split, self.groups.place))
        bias_O = self.bias.new_empty(self.whole_shape[0])
        bound = self.whole_shape[1] ** -0.5
        nn.init.uniform_(bias_O, -bound, bound)
        is_split = self.split.dim == 0
        self.bias.copy_(own_slice(bias_O, self.split, self.groups.place) if is_split else bias_O)


class ColumnLinear(SlicedLinear):
    """Cut by its outputs, and its bias with them."""

    def __init__(
        self, in_features: int, out_features: int, *, groups: Groups, split: Split = COLUMN
    ) -> None:
        super().__init__(in_features, out_features, groups, split)
        mark_split(self.bias, self.whole_shape[:1])

    def forward(self, x_BNI: Tensor) -> Tensor:
        return super().forward(_CopyToGroup.apply(x_BNI, self.groups.tensor_group))  # (B, N, o)


class RowLinear(SlicedLinear):
    """Cut by its inputs. The bias is whole on every rank, and is added once."""

    def __init__(self, in_features: int, out_features: int, *, groups: Groups) -> None:
        super().__init__(in_features, out_features, groups, ROW)

    def forward(self, x_BNi: Tensor) -> Tensor:
        partial_BNO = F.linear(x_BNi, self.weight)
        return _SumOverGroup.apply(partial_BNO, self.groups.tensor_group) + self.bias


class HeadNorm(nn.RMSNorm):
    """One scale for all heads, of which a rank has some: its gradient is the sum over the ranks."""

    def __init__(self, head_size: int, eps: float, *, groups: Groups) -> None:
        super().__init__(head_size, eps)
        self.groups = groups

    def forward(self, x_BhNd: Tensor) -> Tensor:
        # A copy: ZeRO-3 takes the weight's memory back after this.
        weight_d = _CopyToGroup.apply(self.weight.clone(), self.groups.tensor_group)
        return F.rms_norm(x_BhNd, self.normalized_shape, weight_d, self.eps)


class _CopyToGroup(torch.autograd.Function):
    """The input as it is; its gradient is the sum over the ranks, each of which used it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _SumOverGroup(torch.autograd.Function):
    """The sum over the ranks; its gradient, the same on all of them, is that of each summand."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
