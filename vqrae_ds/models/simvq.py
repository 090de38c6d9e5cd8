"""SimVQ: a frozen random codebook seen through one learnable linear layer (arXiv:2411.02038).

Names and losses follow github.com/youngsheen/SimVQ, taming/modules/vqvae/quantize.py, with one correction:
`get_codebook_entry` returns the projected code, the one that `forward` uses.

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
    """The quantiser seen from the training: `code_BND` is the projected code before the straight-through step."""

    code_BND: Tensor
    z_q_BND: Tensor
    vq_loss: Tensor
    indices_BN: Tensor


class FrozenCodebook(nn.Embedding):
    """K random vectors, N(0, 1 / D), never trained."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)
        self.weight.requires_grad_(False)


class SimVQ(nn.Module):
    """Vector quantiser with codes `embedding_proj(embedding)`.

    `legacy=True` is the reference's default loss, mse(sg(q), z) + commitment_cost * mse(q, sg(z));
    `legacy=False` puts the commitment cost on the first term instead. `search` finds the nearest codes.
    """

    code_counts: Tensor

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
        code_BND = self.get_codebook_entry(indices_BN)
        z_q_BND = code_BND.detach() + (z_BND - z_BND.detach())  # the value is exactly the code
        to_code = F.mse_loss(z_BND.float(), code_BND.detach().float())
        to_z = F.mse_loss(code_BND.float(), z_BND.detach().float())
        beta = self.commitment_cost
        vq_loss = to_code + beta * to_z if self.legacy else beta * to_code + to_z
        return Quantized(code_BND, z_q_BND, vq_loss, indices_BN)

    @torch.no_grad()
    def find_codes(self, z_BND: Tensor) -> Tensor:
        """Indices (B, N) of the nearest codes; counted for `get_codebook_usage`."""
        codes_KD = self.embedding_proj(self.embedding.weight)
        indices_BN = self.search(z_BND.flatten(0, 1), codes_KD).view(z_BND.shape[:2])
        self.code_counts += torch.bincount(indices_BN.flatten(), minlength=self.num_embeddings)
        return indices_BN

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        """The projected codes, (*indices.shape, D); equal to `z_q` at those indices."""
        return self.embedding_proj(self.embedding(indices))

    def get_codebook_usage(self) -> float:
        """Fraction of codes used since the last reset, 0..1."""
        return (self.code_counts > 0).double().mean().item()

    def reset_codebook_usage(self) -> None:
        """Forget which codes were used."""
        self.code_counts.zero_()
