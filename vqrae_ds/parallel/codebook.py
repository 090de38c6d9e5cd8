"""SimVQ's frozen codebook over a tensor-parallel group: each rank holds and searches some codes.

All ranks of a group have the same tokens. Each projects its own rows and finds the nearest of them;
one small collective tells which rank's is the nearest of all. The chosen raw rows then come by a
masked lookup and a sum over the group, without gradient for they are frozen, and every rank
projects them with gradient: that of the projection is whole on each, as in one process.

Shapes: B batch, N tokens, K codes, k of them on this rank, D dimensions, R ranks of the group.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqrae_ds.models.simvq import FrozenCodebook
from vqrae_ds.ops.code_distances import lowest_tied, pair_distances
from vqrae_ds.ops.nearest_code import TILE_TOKENS, CodeNorms, Search, nearest_code
from vqrae_ds.parallel.groups import Groups
from vqrae_ds.parallel.marks import mark_split
from vqrae_ds.parallel.slices import COLUMN, bounds, own_slice


class ShardedCodebook(FrozenCodebook):
    """The rows of this rank; the indices are those of the whole codebook."""

    def __init__(self, num_embeddings: int, embedding_dim: int, *, groups: Groups) -> None:
        self.whole_shape, self.groups = (num_embeddings, embedding_dim), groups
        self.first, held = bounds(num_embeddings, groups.place)
        super().__init__(held, embedding_dim)
        mark_split(self.weight, self.whole_shape)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The rows that one process would draw; every rank needs the same random state."""
        whole_KD = self.weight.new_empty(self.whole_shape)
        nn.init.normal_(whole_KD, std=self.embedding_dim**-0.5)
        self.weight.copy_(own_slice(whole_KD, COLUMN, self.groups.place))

    @torch.no_grad()
    def forward(self, indices: Tensor | slice) -> Tensor:
        """The rows (*indices.shape, D) of the whole codebook, or a slice of those of this rank.

        With indices all ranks of the group call it together, with the same ones.
        """
        if isinstance(indices, slice):
            return super().forward(indices)
        position = indices - self.first
        is_held = (position >= 0) & (position < self.num_embeddings)
        rows = super().forward(torch.where(is_held, position, 0))
        rows = torch.where(is_held[..., None], rows, 0)
        # One rank has the row, the others zeros.
        dist.all_reduce(rows, group=self.groups.tensor_group)
        return rows


class GroupSearch:
    """The nearest of all ranks' codes; of equal ones the lowest index, whatever their number.

    `search` finds the nearest of this rank's, and what `ops.code_distances` says of codes holds for
    the winners of the ranks. A rank's winner ties with the nearest of its own codes: where that one
    is further than the nearest of all, but by less than a tie's width, a winner that is between one
    and two widths away leaves its rank's tied codes unseen.
    """

    def __init__(self, num_codes: int, groups: Groups, search: Search = nearest_code) -> None:
        self.groups, self.search = groups, search
        self.first = bounds(num_codes, groups.place).start

    @torch.no_grad()
    def __call__(self, z_ND: Tensor, codes_KD: Tensor, norms: CodeNorms) -> Tensor:
        """Indices (N,) int64 in the whole codebook, the same on all ranks of the group.

        Codes and norms are those of this rank.
        """
        index_N = self.search(z_ND, codes_KD, norms)
        token_N = torch.arange(len(z_ND), device=z_ND.device)
        distance_N = pair_distances(z_ND, codes_KD, token_N, index_N, TILE_TOKENS)
        # An index is exact in float64, so that both travel in one tensor.
        mine_N2 = torch.stack([distance_N, (index_N + self.first).double()], 1)
        all_RN2 = mine_N2.new_empty(self.groups.place.size, *mine_N2.shape)
        dist.all_gather(list(all_RN2), mine_N2, group=self.groups.tensor_group)
        distances_RN, indices_RN = all_RN2.unbind(2)
        return lowest_tied(distances_RN.T, indices_RN.T.long())
