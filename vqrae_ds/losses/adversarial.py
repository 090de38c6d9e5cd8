"""Hinge losses of the patch GAN, and the adaptive weight of its generator term (VQGAN, arXiv:2012.09841, eq. 7).

Shapes: B batch, N tokens, P values a patch, D width of the decoder.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ADAPTIVE_WEIGHT = 1e4
EPSILON = 1e-4


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The generator wants its images judged real."""
    return -fake_logits.mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss, mean of the real and the fake side."""
    return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2


@torch.no_grad()
def adaptive_weight(
    reconstruction_grad_BNP: Tensor,
    adversarial_grad_BNP: Tensor,
    hidden_BND: Tensor,
    mean_over_ranks: Callable[[Tensor], Tensor],
) -> Tensor:
    """|reconstruction gradient| / |adversarial gradient| at the weight of the decoder's head.

    The gradients given are those at the head's output; with its input they are the weight's gradient,
    which ZeRO-3 keeps nowhere. The norms are root mean squares over the ranks: every rank uses the
    same weight, and the reduction is two numbers.
    """
    squares = torch.stack(
        [
            torch.einsum("bnp,bnd->pd", grad.float(), hidden_BND.float()).square().sum()
            for grad in (reconstruction_grad_BNP, adversarial_grad_BNP)
        ]
    )
    reconstruction, adversarial = mean_over_ranks(squares).sqrt()
    return (reconstruction / (adversarial + EPSILON)).clamp(max=MAX_ADAPTIVE_WEIGHT)
