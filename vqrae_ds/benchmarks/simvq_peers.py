"""The SimVQs of the benchmark `simvq`: ours, that of vector-quantize-pytorch, and the textbook's.

All three have the same frozen codebook and the same projection, without a bias for the library has
none, and take tokens (1, N, D). As a program it takes steps in a process of its own, so that their
memory can be measured from outside; FILE then has the memory before the first step, in bytes:

    python -m vqrae_ds.benchmarks.simvq_peers NAME TOKENS CODES DIMENSIONS STEPS FILE
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vqrae_ds.benchmarks.convert import anonymous_memory
from vqrae_ds.models.quantizer import QuantizerOutput
from vqrae_ds.models.simvq import SimVQ

OURS, LIBRARY, TEXTBOOK = "ours", "vector-quantize-pytorch", "textbook"
PEERS = (LIBRARY, TEXTBOOK)


class Sizes(NamedTuple):
    """Of the codebook."""

    num_codes: int = 16384
    dim: int = 1536


Quantize = Callable[[Tensor], QuantizerOutput]  # of tokens (1, N, D)


class Textbook(nn.Module):
    """SimVQ as it is written down: every distance in one matrix, and the whole codebook projected.

    arXiv:2411.02038, section 4, and the distances of github.com/youngsheen/SimVQ:
    |z|^2 + |e|^2 - 2 <z, e>.
    """

    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, dim)
        self.embedding.weight.requires_grad_(False)
        self.projection = nn.Linear(dim, dim, bias=False)

    def forward(self, z_1ND: Tensor) -> QuantizerOutput:
        codes_KD = self.projection(self.embedding.weight)
        z_ND = z_1ND[0]
        distances_NK = (
            z_ND.square().sum(1, keepdim=True)
            + codes_KD.square().sum(1)
            - 2 * torch.matmul(z_ND, codes_KD.t())
        )
        index_N = distances_NK.argmin(1)
        code_1ND = codes_KD[index_N][None]
        loss = F.mse_loss(code_1ND.detach(), z_1ND) + 0.25 * F.mse_loss(code_1ND, z_1ND.detach())
        return QuantizerOutput(z_1ND + (code_1ND - z_1ND).detach(), loss, index_N[None])


def make(name: str, sizes: Sizes) -> Quantize:
    """One of the three, its weights the same at every call and for every name."""
    ours = make_ours(sizes)
    if name == OURS:
        return ours
    if name == TEXTBOOK:
        textbook = Textbook(*sizes)
        textbook.embedding.weight.data = ours.embedding.weight.data
        textbook.projection.weight.data = ours.embedding_proj.weight.data
        return textbook
    from vector_quantize_pytorch import SimVQ as Library  # takes as long to import as torch

    library = Library(sizes.dim, sizes.num_codes, rotation_trick=False)
    library.frozen_codebook = ours.embedding.weight.data
    library.code_transform.weight.data = ours.embedding_proj.weight.data

    def quantize(z_1ND: Tensor) -> QuantizerOutput:
        value, indices, loss = library(z_1ND)
        return QuantizerOutput(value, loss, indices)

    return quantize


def make_ours(sizes: Sizes) -> SimVQ:
    """As the trainer makes it, but for the bias."""
    torch.manual_seed(0)
    return SimVQ(*sizes, bias=False)


def tokens(number: int, dim: int) -> Tensor:
    """Tokens (1, N, D) of standardised features, which know nothing of the codes."""
    return torch.randn(1, number, dim, generator=torch.Generator().manual_seed(1))


def take_step(quantize: Quantize, z_1ND: Tensor) -> Tensor:
    """Forward and backward, for the gradients of tokens and projection; the indices (1, N)."""
    found = quantize(z_1ND.clone().requires_grad_())
    (found.z_q.sum() + found.vq_loss).backward()
    return found.indices


def main() -> None:
    """Build one of them and its tokens, and take the steps."""
    name, *numbers, file = sys.argv[1:]
    num_tokens, num_codes, dim, steps = map(int, numbers)
    quantize, z_1ND = make(name, Sizes(num_codes, dim)), tokens(num_tokens, dim)
    gc.collect()
    Path(file).write_text(str(anonymous_memory(os.getpid())))
    for _ in range(steps):
        take_step(quantize, z_1ND)


if __name__ == "__main__":
    main()
