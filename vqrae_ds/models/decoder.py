"""The symmetric ViT decoder: code features -> patches of pixels.

VQRAE (arXiv:2511.23386), section 3.2: patch size 1, that is a token a patch, and a linear head. The
blocks are pre-norm with LayerScale, by default as many and as wide as the encoder's. The norm of
queries and keys is per head: over the full width it would need a collective under tensor
parallelism.

Shapes: B batch, N = h*w tokens, D width, H heads, d = D / H, P = 3 * q^2 values of a patch of
q x q pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vqrae_ds.config import DecoderConfig
from vqrae_ds.models.activation_checkpointing import Checkpointing, checkpointed
from vqrae_ds.models.positions import resize_positions

NORMS = {"layer_norm": nn.LayerNorm, "rms_norm": nn.RMSNorm}
NORM_EPS = 1e-6


class Layers(NamedTuple):
    """What makes the layers that a tensor-parallel group may divide; each fits the default's call.

    `qkv` and `column` may keep some of their outputs on this rank alone, `row` then takes these as
    its inputs, and gives whole outputs. `head_norm` is the norm of queries and keys, a head each.
    """

    qkv: Callable[[int, int], nn.Module] = nn.Linear
    column: Callable[[int, int], nn.Module] = nn.Linear
    row: Callable[[int, int], nn.Module] = nn.Linear
    head_norm: Callable[[int, float], nn.Module] = nn.RMSNorm


WHOLE = Layers()  # in a single process


class DecoderOutput(NamedTuple):
    """`patches_BhwP` become images by `unpatchify`; `hidden_BND` is what the head made them of."""

    patches_BhwP: Tensor
    hidden_BND: Tensor


class Attention(nn.Module):
    """Multi-head self-attention without a mask."""

    def __init__(self, config: DecoderConfig, layers: Layers = WHOLE) -> None:
        super().__init__()
        width, self.head_size = config.hidden_size, config.hidden_size // config.num_heads
        norm = layers.head_norm if config.use_qk_norm else nn.Identity
        self.qkv = layers.qkv(width, 3 * width)
        self.proj = layers.row(width, width)
        self.q_norm = norm(self.head_size, NORM_EPS)
        self.k_norm = norm(self.head_size, NORM_EPS)

    def forward(self, x_BND: Tensor) -> Tensor:
        qkv = rearrange(
            self.qkv(x_BND), "b n (three h d) -> three b h n d", three=3, d=self.head_size
        )
        q_BHNd, k_BHNd, v_BHNd = qkv
        q_BHNd, k_BHNd = self.q_norm(q_BHNd), self.k_norm(k_BHNd)
        out_BHNd = F.scaled_dot_product_attention(q_BHNd, k_BHNd, v_BHNd)
        return self.proj(rearrange(out_BHNd, "b h n d -> b n (h d)"))


class Mlp(nn.Module):
    """Two linear layers with GELU between."""

    def __init__(self, config: DecoderConfig, layers: Layers = WHOLE) -> None:
        super().__init__()
        self.fc1 = layers.column(config.hidden_size, config.intermediate_size)
        self.fc2 = layers.row(config.intermediate_size, config.hidden_size)

    def forward(self, x_BND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x_BND)))


class LayerScale(nn.Module):
    """A learnable factor a channel, small at first: a deep stack begins near the identity."""

    def __init__(self, width: int, initial: float) -> None:
        super().__init__()
        self.initial = initial
        self.scale = nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.scale, self.initial)

    def forward(self, x_BND: Tensor) -> Tensor:
        return x_BND * self.scale


class Block(nn.Module):
    """x + scale * attention(norm(x)), then x + scale * mlp(norm(x))."""

    def __init__(self, config: DecoderConfig, layers: Layers = WHOLE) -> None:
        super().__init__()
        width, norm = config.hidden_size, NORMS[config.norm_type]
        self.norm1 = norm(width, NORM_EPS)
        self.attention = Attention(config, layers)
        self.scale1 = LayerScale(width, config.layer_scale_init_value)
        self.norm2 = norm(width, NORM_EPS)
        self.mlp = Mlp(config, layers)
        self.scale2 = LayerScale(width, config.layer_scale_init_value)

    def forward(self, x_BND: Tensor) -> Tensor:
        x_BND = x_BND + self.scale1(self.attention(self.norm1(x_BND)))
        return x_BND + self.scale2(self.mlp(self.norm2(x_BND)))


class PixelHead(nn.Linear):
    """Hidden features -> pixels of a patch. The bias starts at mid-grey, the middle of [0, 1]."""

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.bias, 0.5)


class PositionEmbedding(nn.Module):
    """A learned vector a position of a `side` x `side` grid, interpolated for other grids."""

    def __init__(self, side: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, side * side, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.trunc_normal_(self.weight, std=0.02)

    def forward(self, x_BND: Tensor, h: int, w: int) -> Tensor:
        return x_BND + resize_positions(self.weight, h, w)


class Decoder(nn.Module):
    """Position embedding, blocks, norm and head.

    `config` has every field set (`resolve_model`), `side` is the side of the grid that the position
    embedding is learned on, and `patch_size` that of a patch of the output in pixels. In training
    mode the blocks keep for the backward pass what `checkpointing` says. They are made of `layers`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        side: int,
        patch_size: int,
        checkpointing: Checkpointing = "none",
        layers: Layers = WHOLE,
    ) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.position = PositionEmbedding(side, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layers) for _ in range(config.num_layers))
        self.norm = NORMS[config.norm_type](config.hidden_size, NORM_EPS)
        self.head = PixelHead(config.hidden_size, 3 * patch_size**2)

    def forward(self, x_BND: Tensor, h: int, w: int) -> DecoderOutput:
        """Decode the features of a grid of `h` x `w` tokens, in row-major order."""
        x_BND = self.position(x_BND, h, w)
        kind = self.checkpointing if self.training else "none"
        for block in self.blocks:
            x_BND = checkpointed(block, x_BND, kind=kind)
        hidden_BND = self.norm(x_BND)
        patches_BhwP = self.head(hidden_BND).unflatten(1, (h, w))
        return DecoderOutput(patches_BhwP, hidden_BND)


def patchify(images_B3HW: Tensor, h: int) -> Tensor:
    """Images (B, 3, h*q, w*q) -> patches (B, h, w, 3 * q * q): the inverse of `unpatchify`."""
    q = images_B3HW.shape[-2] // h
    return rearrange(images_B3HW, "b c (h p) (w q) -> b h w (c p q)", p=q, q=q)


def unpatchify(patches_BhwP: Tensor) -> Tensor:
    """Patches (B, h, w, 3 * q * q), each a flattened (3, q, q), -> images (B, 3, h*q, w*q)."""
    q = round((patches_BhwP.shape[-1] / 3) ** 0.5)
    return rearrange(patches_BhwP, "b h w (c p q) -> b c (h p) (w q)", c=3, p=q)
