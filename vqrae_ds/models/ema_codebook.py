"""The plain baseline beside SimVQ: codes learned as moving averages (arXiv:1711.00937, A.1).

State, update and its synchronisation over ranks are `VectorQuantize` of vector-quantize-pytorch.
The search is ours, and so is the straight-through step: the library's forward reads a flag back
from the device each time, and its straight-through value `z + (code - z)` is not exactly the code.
Its update builds a one-hot matrix of tokens x codes, 12 bytes an entry, while it runs.

Shapes: B batch, N tokens, D embedding dimension, K codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqrae_ds.models.quantizer import Quantized, Quantizer
from vqrae_ds.ops.nearest_code import Search, nearest_code


class EMACodebook(Quantizer):
    """Vector quantiser whose K codes are moving averages of the tokens that found them.

    In training mode each `forward` and `quantize` moves the codes, after the tokens were quantised
    and with the tokens of all ranks; nothing else moves them. So they move once a micro batch, and
    with the same global batch on fewer ranks more often: choose `decay` for the accumulation. The
    loss is `commitment_cost * mse(z, code)` in fp32. No tricks: no k-means start, no replacing of
    dead codes, no rotation.

    The codes are buffers, without gradient. Build it after the process group; who builds it sees to
    it that all ranks begin with the same codes.

    Raises `ValueError` where vector-quantize-pytorch is not installed.
    """

    def __init__(
        self,
        num_embeddings: int = 8192,
        embedding_dim: int = 768,
        commitment_cost: float = 0.25,
        decay: float = 0.99,
        *,
        search: Search = nearest_code,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, search)
        try:  # here, for it takes as long to import as torch
            from vector_quantize_pytorch import VectorQuantize
        except ImportError as error:
            raise ValueError(
                "use_simvq = false needs vector-quantize-pytorch: pip install -r requirements.txt"
            ) from error
        self.commitment_cost = commitment_cost
        self._is_synchronised = _has_peers()
        self._before_step: dict[str, Tensor] | None = None
        self.vq = VectorQuantize(
            dim=embedding_dim,
            codebook_size=num_embeddings,
            decay=decay,
            commitment_weight=commitment_cost,
            rotation_trick=False,
            sync_codebook=self._is_synchronised,
        )

    def codes_at(self, indices: Tensor, values: Tensor | None = None) -> Tensor:
        """The codes (*indices.shape, D), as they are now, at indices inside the codebook."""
        return F.embedding(indices, self.vq.codebook) if values is None else values

    def loss(self, z_BND: Tensor, code_BND: Tensor) -> Tensor:
        """The commitment of the tokens to their codes, which have no gradient."""
        return self.commitment_cost * F.mse_loss(z_BND.float(), code_BND.float())

    def quantize(self, z_BND: Tensor) -> Quantized:
        """As in the base class; in training mode the codebook then learns from `z_BND`.

        Raises `ValueError`, on all ranks alike, where it was built before the process group.
        """
        quantized = super().quantize(z_BND)
        if self.training:
            if self._before_step is None:
                self._before_step = {n: b.clone() for n, b in self.vq._codebook.named_buffers()}
            self._learn(z_BND.detach(), quantized.indices_BN)
        return quantized

    @torch.no_grad()
    def finish_step(self, *, is_taken: bool) -> None:
        """As in the base class: the codes learn in the forward pass, so they are put back."""
        if self._before_step is not None and not is_taken:
            for name, buffer in self.vq._codebook.named_buffers():
                buffer.copy_(self._before_step[name])
        self._before_step = None

    def resets(self) -> Iterator[tuple[nn.Module, Callable[[], None]]]:
        """As in the base class: the module that holds the codes has no method of its own for it."""
        yield self.vq._codebook, self.reset_parameters

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the codes anew, as the library does, and forget what they learned from."""
        state = self.vq._codebook
        nn.init.kaiming_uniform_(state.embed)
        state.embed_avg.copy_(state.embed)
        state.cluster_size.fill_(1)
        state.initted.fill_(True)

    @torch.no_grad()
    def reset_unsaved_buffers(self) -> None:
        """As in the base class."""
        super().reset_unsaved_buffers()
        self.vq.zero.zero_()

    def _learn(self, z_BND: Tensor, indices_BN: Tensor) -> None:
        if _has_peers() and not self._is_synchronised:
            raise ValueError(
                "EMACodebook was built before the process group, so the codebooks of the ranks "
                "would drift apart: build it after torch.distributed.init_process_group"
            )
        with torch.autocast(z_BND.device.type, enabled=False):  # sums over tokens need fp32
            self.vq.update_indices(z_BND, indices_BN)


def _has_peers() -> bool:
    """Whether the library has ranks to synchronise.

    It keeps the first answer for itself, which may be older than the process group.
    """
    from vector_quantize_pytorch.vector_quantize_pytorch import is_distributed

    return is_distributed.__wrapped__()
