"""Hinge losses of the GAN, and the adaptive weight of the generator's.

The weight is that of VQGAN (arXiv:2012.09841, eq. 7), with epsilon and limit as in its code
(github.com/CompVis/taming-transformers, taming/modules/losses/vqperceptual.py).

Shapes: B batch, N tokens, P values a patch, D width of the decoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_ADAPTIVE_WEIGHT = 1e4
EPSILON = 1e-4


def generator_loss(fake_logits: Tensor) -> Tensor:
    """The generator wants its images judged real."""
    return -fake_logits.float().mean()


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Hinge loss, mean of the real and the fake side: 0 once all logits are beyond +1 and -1."""
    real, fake = real_logits.float(), fake_logits.float()
    return (F.relu(1 - real).mean() + F.relu(1 + fake).mean()) / 2


@torch.no_grad()
def head_gradient_squares(
    reconstruction_grad_BNP: Tensor, adversarial_grad_BNP: Tensor, hidden_BND: Tensor
) -> Tensor:
    """|gradient|^2 of both losses at the weight of the decoder's head: (2,), fp32.

    The gradients given are those at the head's output, `hidden_BND` is its input: together they
    make the gradient of the weight, which ZeRO-3 keeps nowhere.
    """
    squares = [
        torch.einsum("bnp,bnd->pd", grad.float(), hidden_BND.float()).square().sum()
        for grad in (reconstruction_grad_BNP, adversarial_grad_BNP)
    ]
    return torch.stack(squares)


@torch.no_grad()
def adaptive_weight(squares_2: Tensor) -> Tensor:
    """|reconstruction gradient| / |adversarial gradient|, at most `MAX_ADAPTIVE_WEIGHT`.

    `squares_2` is the mean over ranks of their `head_gradient_squares`. So the norms are root mean
    squares, and every rank uses the same scalar.
    """
    reconstruction, adversarial = squares_2.sqrt()
    return (reconstruction / (adversarial + EPSILON)).clamp(max=MAX_ADAPTIVE_WEIGHT)
