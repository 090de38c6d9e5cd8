"""SimVQ: a frozen random codebook seen through one learnable linear layer (arXiv:2411.02038).

Names and losses follow github.com/youngsheen/SimVQ, taming/modules/vqvae/quantize.py, with one
correction: `get_codebook_entry` returns the projected code, the one that `forward` uses.

Shapes: B batch, N tokens, D embedding dimension, K codes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqrae_ds.models.quantizer import Quantizer, Search
from vqrae_ds.ops.nearest_code import nearest_code

PROJECTION_INITS = ("linear", "identity", "orthogonal")


class FrozenCodebook(nn.Embedding):
    """K random vectors with components from N(0, 1 / D), never trained.

    A rank of a tensor-parallel group may hold some of them only: `forward` gives any of all.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.weight.requires_grad_(False)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.embedding_dim**-0.5)

    def forward(self, indices: Tensor | None = None) -> Tensor:
        """The vectors (*indices.shape, D), or all that are held here."""
        if indices is None:
            indices = torch.arange(self.num_embeddings, device=self.weight.device)
        return super().forward(indices)


Codebook = Callable[[int, int], FrozenCodebook]  # (num_embeddings, embedding_dim)


class CodebookProjection(nn.Linear):
    """The learnable layer, which draws its own first weights: ZeRO-3 has them drawn by module.

    `init` is "linear" (the default of `nn.Linear`, as in the reference), "identity" or
    "orthogonal"; the bias of the last two is 0.
    """

    def __init__(self, dim: int, *, bias: bool, init: str) -> None:
        if init not in PROJECTION_INITS:
            raise ValueError(
                f"projection_init = {init!r} is unknown: it is one of {', '.join(PROJECTION_INITS)}"
            )
        self.init = init  # before the constructor, which draws
        super().__init__(dim, dim, bias=bias)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.init == "linear":
            super().reset_parameters()
            return
        if self.init == "identity":
            self.weight.zero_().fill_diagonal_(1)
        else:  # in fp32: the QR decomposition has no bf16
            self.weight.copy_(nn.init.orthogonal_(self.weight.float()))
        if self.bias is not None:
            self.bias.zero_()


class SimVQ(Quantizer):
    """Vector quantiser with K codes `embedding_proj(embedding)`, the nearest by L2 distance.

    The loss, a mean over elements in fp32, with sg = stop-gradient and q the code of z:

        legacy=True   mse(z, sg(q)) + commitment_cost * mse(q, sg(z)), the reference's default
        legacy=False  commitment_cost * mse(z, sg(q)) + mse(q, sg(z))

    `bias` and `projection_init` are those of the projection (see `CodebookProjection`; `ValueError`
    for an unknown one). `search` finds the nearest codes, `codebook` makes what holds the vectors.
    """

    def __init__(
        self,
        num_embeddings: int = 16384,
        embedding_dim: int = 1536,
        commitment_cost: float = 0.25,
        legacy: bool = True,
        *,
        bias: bool = True,
        projection_init: str = "linear",
        search: Search = nearest_code,
        codebook: Codebook = FrozenCodebook,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, search)
        self.commitment_cost, self.legacy = commitment_cost, legacy
        self.embedding = codebook(num_embeddings, embedding_dim)
        self.embedding_proj = CodebookProjection(embedding_dim, bias=bias, init=projection_init)

    def codes_at(self, indices: Tensor) -> Tensor:
        """The projected codes (*indices.shape, D) at indices inside the codebook."""
        # Weights are reached by calling their module: a sharded one holds them only while it runs.
        return self.embedding_proj(self.embedding(indices))

    def searched_codes(self) -> Tensor:
        return self.embedding_proj(self.embedding())

    def loss(self, z_BND: Tensor, code_BND: Tensor) -> Tensor:
        """Both sides of the distance between tokens and codes; see the class."""
        to_code = F.mse_loss(z_BND.float(), code_BND.detach().float())
        to_z = F.mse_loss(code_BND.float(), z_BND.detach().float())
        beta = self.commitment_cost
        return to_code + beta * to_z if self.legacy else beta * to_code + to_z
