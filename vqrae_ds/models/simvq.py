"""SimVQ: a frozen random codebook seen through one learnable linear layer (arXiv:2411.02038).

Names and losses follow github.com/youngsheen/SimVQ, taming/modules/vqvae/quantize.py, with one
correction: `get_codebook_entry` returns the projected code, the one that `forward` uses.

Shapes: B batch, N tokens, D embedding dimension, K codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vqrae_ds.models.quantizer import Quantizer, SearchedCodes
from vqrae_ds.ops.nearest_code import Search, code_norms, nearest_code

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

    def forward(self, indices: Tensor | slice) -> Tensor:
        """The vectors (*indices.shape, D), or a slice of those that are held here, not copied."""
        if isinstance(indices, slice):
            return self.weight.detach()[indices]
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

    def forward(self, rows: Tensor, values: Tensor | None = None) -> Tensor:
        """The projected rows (..., D); `values` has them, where they are known already."""
        if values is None:
            return super().forward(rows)
        return KnownProjection.apply(values, rows, self.weight, self.bias)


class KnownProjection(torch.autograd.Function):
    """A linear layer of which the result is known, on frozen rows.

    What is left to do is the gradient of its weights. The result is a view: not to be changed.
    """

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, rows: Tensor, _weight: Tensor, _bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(rows)
        return values.view_as(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, Tensor | None, Tensor | None]:
        (rows,) = ctx.saved_tensors
        grad_ND, rows_ND = (each.reshape(-1, each.shape[-1]) for each in (grad, rows))
        _, _, has_weight, has_bias = ctx.needs_input_grad
        grad_weight = grad_ND.T @ rows_ND.to(grad.dtype) if has_weight else None
        return None, None, grad_weight, grad_ND.sum(0) if has_bias else None


class SimVQ(Quantizer):
    """Vector quantiser with K codes `embedding_proj(embedding)`, the nearest by L2 distance.

    The loss, a mean over elements in fp32, with sg = stop-gradient and q the code of z:

        legacy=True   mse(z, sg(q)) + commitment_cost * mse(q, sg(z)), the reference's default
        legacy=False  commitment_cost * mse(z, sg(q)) + mse(q, sg(z))

    `bias` and `projection_init` are those of the projection (see `CodebookProjection`; `ValueError`
    for an unknown one). `search` finds the nearest codes, `codebook` makes what holds the vectors.

    **When the codes are projected.** Left to itself, all of them at each call: a weight may have
    changed in between, and under ZeRO-3 nothing on the tensor tells, its `_version` least of all.
    After `keep_codes` they are projected once and kept until `forget_codes`, which whoever called
    the former has promised to call after each change: a trainer makes them once an optimizer step,
    for all micro batches and the validation behind it. Loading a state dict and moving the module
    to another device or dtype forget them too; a copy of the module has made no promise.
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
        self._keeps_codes = False
        self._kept: SearchedCodes | None = None

    def codes_at(self, indices: Tensor, values: Tensor | None = None) -> Tensor:
        """As in the base class; with `values` no row is projected once more."""
        # Weights are reached by calling their module: a sharded one holds them only while it runs.
        return self.embedding_proj(self.embedding(indices), values)

    @torch.no_grad()
    def searched_codes(self) -> SearchedCodes:
        """As in the base class, of the rows that are held here; see the class for when."""
        # With kept codes both layers still run, on no rows: ZeRO-3 fetches weights ahead in the
        # order of the modules of the last pass, and starts anew where a pass leaves one out.
        rows = slice(None) if self._kept is None else slice(0)
        codes_KD = self.embedding_proj(self.embedding(rows))
        if self._kept is not None:
            return self._kept
        codes = SearchedCodes(codes_KD, code_norms(codes_KD))
        if self._keeps_codes:
            self._kept = codes
        return codes

    def keep_codes(self) -> None:
        """As in the base class: the projected codes (K, D) and their norms are kept."""
        self._keeps_codes = True

    def forget_codes(self) -> None:
        """As in the base class."""
        self._kept = None

    def loss(self, z_BND: Tensor, code_BND: Tensor) -> Tensor:
        """Both sides of the distance between tokens and codes; see the class."""
        to_code = F.mse_loss(z_BND.float(), code_BND.detach().float())
        to_z = F.mse_loss(code_BND.float(), z_BND.detach().float())
        beta = self.commitment_cost
        return to_code + beta * to_z if self.legacy else beta * to_code + to_z

    def _load_from_state_dict(self, *args: Any, **options: Any) -> None:
        self.forget_codes()
        super()._load_from_state_dict(*args, **options)

    def _apply(self, *args: Any, **options: Any) -> SimVQ:
        self.forget_codes()
        return super()._apply(*args, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_keeps_codes": False, "_kept": None}
