"""What every quantiser shares: shapes, the search, the straight-through step, and code statistics.

A quantiser adds what its codes are (`codes_at`) and what its loss is (`loss`).

Shapes: B batch, N tokens, H x W grid of tokens, D embedding dimension, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vqrae_ds.ops.nearest_code import CodeNorms, Search, code_norms, nearest_code

AllReduce = Callable[[Tensor], object]  # sums a tensor over ranks, in place


class SearchedCodes(NamedTuple):
    """All codes that a search is given, or those of them that this rank holds."""

    codes_KD: Tensor
    norms: CodeNorms


class Chosen(NamedTuple):
    """The nearest codes, and without gradient their values, where all codes are held here."""

    indices_BN: Tensor
    value_BND: Tensor | None


class QuantizerOutput(NamedTuple):
    """`z_q` has the shape of the input, `indices` the same without the channel dimension."""

    z_q: Tensor
    vq_loss: Tensor
    indices: Tensor


class Quantized(NamedTuple):
    """What training needs: `code_BND` is the code of each token before the straight-through step.

    Its dtype is that of the codes, that of `z_q_BND` is the input's.
    """

    code_BND: Tensor
    z_q_BND: Tensor
    vq_loss: Tensor
    indices_BN: Tensor


class CodebookStatistics(NamedTuple):
    """`usage` is the fraction of codes used, 0..1, and `dead_codes` counts the others.

    `perplexity` is the number of codes that, all used alike, would have the same entropy; 0 where
    no code was used.
    """

    usage: float
    perplexity: float
    dead_codes: int


def codebook_statistics(counts_K: Tensor) -> CodebookStatistics:
    """The statistics of how often each code was used."""
    counts_K = counts_K.double()
    num_used = int((counts_K > 0).sum())
    entropy = torch.special.entr(counts_K / counts_K.sum()).sum()
    perplexity = entropy.exp().item() if num_used else 0.0
    return CodebookStatistics(num_used / len(counts_K), perplexity, len(counts_K) - num_used)


class Quantizer(nn.Module):
    """Replaces each token by the nearest of K codes; `search` finds it."""

    code_counts: Tensor  # (K,) int64: how often each code was found since the last reset

    def __init__(
        self, num_embeddings: int, embedding_dim: int, search: Search = nearest_code
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.search = num_embeddings, embedding_dim, search
        counts = torch.zeros(num_embeddings, dtype=torch.int64)
        self.register_buffer("code_counts", counts, persistent=False)

    def codes_at(self, indices: Tensor, values: Tensor | None = None) -> Tensor:
        """The codes (*indices.shape, D) at indices inside the codebook; what trains has a gradient.

        `values`, where whoever calls has them already, are the same codes without one.
        """
        raise NotImplementedError

    def searched_codes(self) -> SearchedCodes:
        """What `search` is given, without gradient."""
        indices_K = torch.arange(self.num_embeddings, device=self.code_counts.device)
        codes_KD = self.codes_at(indices_K)
        return SearchedCodes(codes_KD, code_norms(codes_KD))

    def keep_codes(self) -> None:
        """Allow that what `searched_codes` has made is used again until `forget_codes`.

        Whoever calls it promises to call `forget_codes` whenever a weight has changed.
        """

    def forget_codes(self) -> None:
        """A weight has changed, so that codes made before are no longer those of the weights."""

    def loss(self, z_BND: Tensor, code_BND: Tensor) -> Tensor:
        """The quantiser's loss, a fp32 scalar."""
        raise NotImplementedError

    def forward(self, z: Tensor) -> QuantizerOutput:
        """Quantise `z`, (B, D, H, W) or (B, N, D).

        Raises `ValueError` on another shape, and on values that are not finite.
        """
        D = self.embedding_dim
        if z.ndim == 4 and z.shape[1] == D:
            z_BND = z.flatten(2).transpose(1, 2)
        elif z.ndim == 3 and z.shape[2] == D:
            z_BND = z
        else:
            raise ValueError(
                f"z has shape {tuple(z.shape)}; {type(self).__name__} takes (B, {D}, H, W) or "
                f"(B, N, {D})"
            )
        self.check_finite(z_BND)
        _, z_q_BND, vq_loss, indices_BN = self.quantize(z_BND)
        if z.ndim == 3:
            return QuantizerOutput(z_q_BND, vq_loss, indices_BN)
        z_q = z_q_BND.transpose(1, 2).reshape(z.shape)
        return QuantizerOutput(z_q, vq_loss, indices_BN.unflatten(1, z.shape[2:]))

    def quantize(self, z_BND: Tensor) -> Quantized:
        """The nearest code of each token, the straight-through value, and the loss.

        Training calls this and not `forward`: nothing is read back from the device but by a search
        that does (`ops.nearest_code`, and not its kernels), and values that are not finite are not
        refused, for a rank that raises alone leaves its peers hanging in their next collective. The
        loss is not finite then, which stops all ranks together.
        """
        indices_BN, value_BND = self._choose(z_BND, with_values=torch.is_grad_enabled())
        code_BND = self.codes_at(indices_BN, value_BND)
        # z - z is 0 in value, so the value is exactly the code, and has the gradient of z.
        z_q_BND = code_BND.detach().to(z_BND.dtype) + (z_BND - z_BND.detach())
        return Quantized(code_BND, z_q_BND, self.loss(z_BND, code_BND), indices_BN)

    def find_codes(self, z_BND: Tensor) -> Tensor:
        """Indices (B, N) int64 of the nearest codes, counted for the statistics."""
        return self._choose(z_BND, with_values=False).indices_BN

    @torch.no_grad()
    def _choose(self, z_BND: Tensor, *, with_values: bool) -> Chosen:
        searched = self.searched_codes()
        found_N = self.search(z_BND.flatten(0, 1), *searched)
        self.code_counts.index_add_(0, found_N, torch.ones_like(found_N))
        indices_BN = found_N.view(z_BND.shape[:2])
        has_all = len(searched.codes_KD) == self.num_embeddings
        value_BND = searched.codes_KD[indices_BN] if with_values and has_all else None
        return Chosen(indices_BN, value_BND)

    def finish_step(self, *, is_taken: bool) -> None:
        """A training step has ended; one that is not taken must leave no trace in the codes."""
        if is_taken:
            self.forget_codes()

    def check_finite(self, z_BND: Tensor) -> None:
        """Raise `ValueError` where a value is not finite. Reads back from the device."""
        is_bad_BND = ~z_BND.isfinite()
        if count := int(is_bad_BND.sum()):
            batch, position = is_bad_BND.any(2).nonzero()[0].tolist()
            raise ValueError(
                f"{count} of {z_BND.numel()} values of z are not finite, the first of them in "
                f"token ({batch}, {position}), as (batch, position): usually the weights are "
                "damaged or their training diverged, or the images are not finite themselves"
            )

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        """The codes (*indices.shape, D): those that `forward` gives for these indices.

        To rounding where `forward` has a gradient: there they come from a product of all codes.
        Raises `ValueError` for an index outside [0, num_embeddings).
        """
        outside = indices[(indices < 0) | (indices >= self.num_embeddings)]
        if len(outside):
            raise ValueError(
                f"index {outside[0].item()} is outside the codebook: "
                f"its {self.num_embeddings} codes are 0 to {self.num_embeddings - 1}"
            )
        return self.codes_at(indices)

    def get_codebook_statistics(self, all_reduce: AllReduce | None = None) -> CodebookStatistics:
        """The statistics since the last reset, of this rank.

        With `all_reduce` (`torch.distributed.all_reduce` fits) of all ranks, each of which calls.
        """
        counts_K = self.code_counts.clone()
        if all_reduce is not None:
            all_reduce(counts_K)
        return codebook_statistics(counts_K)

    def get_codebook_usage(self) -> float:
        """Fraction of codes used on this rank since the last reset, 0..1."""
        return self.get_codebook_statistics().usage

    def reset_codebook_usage(self) -> None:
        """Forget which codes were used."""
        self.code_counts.zero_()

    def resets(self) -> Iterator[tuple[nn.Module, Callable[[], None]]]:
        """Each module with stored tensors of its own, and the call that draws them anew."""
        for module in self.modules():
            if any(True for _ in module.parameters(recurse=False)):
                yield module, module.reset_parameters

    def reset_unsaved_buffers(self) -> None:
        """Give the buffers that are in no state dict their first value.

        A model that was built on the meta device needs it after `to_empty`.
        """
        self.reset_codebook_usage()
