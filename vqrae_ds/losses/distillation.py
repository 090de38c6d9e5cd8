"""The two terms of self-distillation in stage 2.

The quantised term draws the projected code towards the continuous feature. It is taken before
the straight-through step: after it, its gradient would be the exact opposite of the commitment
term's. There it trains the projection and cannot hold the encoder, so the paper's term
(arXiv:2511.23386, eq. 5) stands beside it: the un-quantised features stay near those of a frozen
copy of the first encoder.

Shapes: B batch, N tokens, D encoder width, E codebook dimension.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def quantized_loss(code_BNE: Tensor, z_BNE: Tensor) -> Tensor:
    """Mean squared error of the projected codes against what was quantised, which is detached."""
    return F.mse_loss(code_BNE.float(), z_BNE.detach().float())


def teacher_loss(features_BND: Tensor, teacher_features_BND: Tensor) -> Tensor:
    """Mean squared error of the features against the first encoder's."""
    return F.mse_loss(features_BND.float(), teacher_features_BND.float())


@torch.no_grad()
def feature_cosine(features_BND: Tensor, teacher_features_BND: Tensor) -> Tensor:
    """Cosine with the first encoder's features, mean over tokens: (B,), 1 if nothing changed."""
    cosine_BN = F.cosine_similarity(features_BND.float(), teacher_features_BND.float(), dim=-1)
    return cosine_BN.mean(1)
