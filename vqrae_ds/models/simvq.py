"""SimVQ: a frozen random codebook seen through one learnable linear layer (arXiv:2411.02038).

Names and losses follow github.com/youngsheen/SimVQ, taming/modules/vqvae/quantize.py, with one
correction: `get_codebook_entry` returns the projected code, the one that `forward` uses.

Shapes: B batch, N tokens, D embedding dimension, K codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqrae_ds.ops.nearest_code import nearest_code

Search = Callable[[Tensor, Tensor], Tensor]  # (z_ND, codes_KD) -> indices (N,)


class SimVQOutput(NamedTuple):
    """`z_q` has the shape of the input, `indices` the same without the channel dimension."""

    z_q: Tensor
    vq_loss: Tensor
    indices: Tensor


class Quantized(NamedTuple):
    """What training needs: `code_BND` is the projected code before the straight-through step."""

    code_BND: Tensor
    z_q_BND: Tensor
    vq_loss: Tensor
    indices_BN: Tensor


class FrozenCodebook(nn.Embedding):
    """K random vectors with components from N(0, 1 / D), never trained."""

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.weight.requires_grad_(False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)


class SimVQ(nn.Module):
    """Vector quantiser with K codes `embedding_proj(embedding)`, the nearest by L2 distance.

    The loss, a mean over elements in fp32, with sg = stop-gradient and q the code of z:

        legacy=True   mse(z, sg(q)) + commitment_cost * mse(q, sg(z)), the reference's default
        legacy=False  commitment_cost * mse(z, sg(q)) + mse(q, sg(z))

    `search` finds the nearest codes.
    """

    code_counts: Tensor  # (K,) int64: how often each code was found since the last reset

    def __init__(
        self,
        num_embeddings: int = 16384,
        embedding_dim: int = 1536,
        commitment_cost: float = 0.25,
        legacy: bool = True,
        *,
        search: Search = nearest_code,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.commitment_cost, self.legacy, self.search = commitment_cost, legacy, search
        self.embedding = FrozenCodebook(num_embeddings, embedding_dim)
        self.embedding_proj = nn.Linear(embedding_dim, embedding_dim)
        counts = torch.zeros(num_embeddings, dtype=torch.int64)
        self.register_buffer("code_counts", counts, persistent=False)

    def forward(self, z: Tensor) -> SimVQOutput:
        """Quantise `z`, (B, D, H, W) or (B, N, D). Raises `ValueError` on another shape."""
        if z.ndim == 4 and z.shape[1] == self.embedding_dim:
            B, _, H, W = z.shape
            quantized = self.quantize(z.flatten(2).transpose(1, 2))
            z_q = quantized.z_q_BND.transpose(1, 2).reshape(z.shape)
            return SimVQOutput(z_q, quantized.vq_loss, quantized.indices_BN.view(B, H, W))
        if z.ndim == 3 and z.shape[2] == self.embedding_dim:
            quantized = self.quantize(z)
            return SimVQOutput(quantized.z_q_BND, quantized.vq_loss, quantized.indices_BN)
        D = self.embedding_dim
        raise ValueError(f"z has shape {tuple(z.shape)}; SimVQ takes (B, {D}, H, W) or (B, N, {D})")

    def quantize(self, z_BND: Tensor) -> Quantized:
        """The nearest projected code of each token, the straight-through value, and the loss."""
        indices_BN = self.find_codes(z_BND)
        code_BND = self._project(indices_BN)  # of the chosen codes alone, with gradient
        z_q_BND = code_BND.detach() + (z_BND - z_BND.detach())  # the value is exactly the code
        to_code = F.mse_loss(z_BND.float(), code_BND.detach().float())
        to_z = F.mse_loss(code_BND.float(), z_BND.detach().float())
        beta = self.commitment_cost
        vq_loss = to_code + beta * to_z if self.legacy else beta * to_code + to_z
        return Quantized(code_BND, z_q_BND, vq_loss, indices_BN)

    @torch.no_grad()
    def find_codes(self, z_BND: Tensor) -> Tensor:
        """Indices (B, N) int64 of the nearest codes; counted for `get_codebook_usage`."""
        # Weights are reached by calling their module: a sharded one holds them only while it runs.
        codes_KD = self._project(torch.arange(self.num_embeddings, device=z_BND.device))
        indices_BN = self.search(z_BND.flatten(0, 1), codes_KD).view(z_BND.shape[:2])
        found = indices_BN.flatten()
        self.code_counts.index_add_(0, found, torch.ones_like(found))
        return indices_BN

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        """The projected codes, (*indices.shape, D); equal to `z_q` at those indices.

        Raises `ValueError` for an index outside [0, num_embeddings).
        """
        outside = indices[(indices < 0) | (indices >= self.num_embeddings)]
        if len(outside):
            raise ValueError(
                f"index {outside[0].item()} is outside the codebook: "
                f"its {self.num_embeddings} codes are 0 to {self.num_embeddings - 1}"
            )
        return self._project(indices)

    def get_codebook_usage(self) -> float:
        """Fraction of codes used since the last reset, 0..1."""
        return (self.code_counts > 0).double().mean().item()

    def reset_codebook_usage(self) -> None:
        """Forget which codes were used."""
        self.code_counts.zero_()

    def _project(self, indices: Tensor) -> Tensor:
        return self.embedding_proj(self.embedding(indices))
