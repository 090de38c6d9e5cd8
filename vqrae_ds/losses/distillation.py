"""The two terms of self-distillation in stage 2, and how far the features have moved.

The quantised term draws the projected code towards the continuous feature. It is taken before
the straight-through step: after it, its gradient would be the exact opposite of the commitment
term's. There it trains the projection and cannot hold the encoder, so the paper's term
(arXiv:2511.23386, eq. 5) stands beside it: the un-quantised features stay near those of a frozen
copy of the first encoder.

Each has a choice of two distances, taken in fp32: `l2` is the mean squared error, `cosine` is one
minus the cosine, mean over tokens.

Shapes: B batch, N tokens, C channels, D encoder width, E codebook dimension.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Distance = Literal["l2", "cosine"]


def quantized_loss(code_BNE: Tensor, z_BNE: Tensor, kind: Distance) -> Tensor:
    """Distance of the projected codes from what was quantised, which is detached."""
    return _distance(code_BNE, z_BNE.detach(), kind)


def teacher_loss(features_BND: Tensor, teacher_features_BND: Tensor, kind: Distance) -> Tensor:
    """Distance of the features from the first encoder's."""
    return _distance(features_BND, teacher_features_BND, kind)


@torch.no_grad()
def retention(features_BND: Tensor, teacher_features_BND: Tensor) -> dict[str, Tensor]:
    """Both measures of what is left of the first encoder's features, by the names of their terms.

    The cosine is 1 and the mean squared error 0 if nothing changed.
    """
    cosine = feature_cosine(features_BND, teacher_features_BND).mean()
    return {
        "retention/cosine": cosine,
        "retention/l2": _distance(features_BND, teacher_features_BND, "l2"),
    }


@torch.no_grad()
def feature_cosine(features_BND: Tensor, teacher_features_BND: Tensor) -> Tensor:
    """Cosine with the first encoder's features, mean over tokens: (B,), 1 if nothing changed."""
    return _cosine(features_BND, teacher_features_BND).mean(1)


def _distance(ours_BNC: Tensor, theirs_BNC: Tensor, kind: Distance) -> Tensor:
    if kind == "cosine":
        return 1 - _cosine(ours_BNC, theirs_BNC).mean()
    return F.mse_loss(ours_BNC.float(), theirs_BNC.float())


def _cosine(ours_BNC: Tensor, theirs_BNC: Tensor) -> Tensor:
    return F.cosine_similarity(ours_BNC.float(), theirs_BNC.float(), dim=-1)  # (B, N)
