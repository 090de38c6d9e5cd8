"""What the networks that judge images keep for a backward pass, from shapes alone.

Their weights are frozen where the generator's gradient is asked for; only the images have one.
"""

from __future__ import annotations

import math

from vqrae_ds.config import AdversarialConfig
from vqrae_ds.models.discriminator import POOLED_SIDE

FP32, INT64 = 4, 8
VGG16 = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # channels and convolutions of a slice
CONVNEXT_S = ((96, 3), (192, 3), (384, 27), (768, 3))  # channels and blocks of a stage
CONVNEXT_SIDE = 224
FIRST_STRIDE = 4  # of ConvNeXt


def lpips_bytes(images: int, side: int) -> float:
    """The most that LPIPS takes of `images` pairs of `side` x `side` px, when it compares them.

    Each convolution's result is kept (its ReLU works in place), each pooling's with int64 indices,
    and for the comparison the difference and its square. Only the comparison holds the features of
    the targets, and both sides normalised.
    """
    return lpips_kept_bytes(images, side) + _lpips_features(images, side, copies=3)


def lpips_kept_bytes(images: int, side: int) -> float:
    """Bytes that LPIPS keeps from its forward to its backward pass; see `lpips_bytes`."""
    size = 2 * 3 * side**2 * FP32  # the images, scaled twice
    for level, (channels, convolutions) in enumerate(VGG16):
        pixels = (side // 2**level) ** 2
        size += convolutions * channels * pixels * FP32
        size += 2 * pixels * FP32  # the norm over channels, before and after the root
        if level > 0:
            size += VGG16[level - 1][0] * pixels * (FP32 + INT64)
    return images * size + _lpips_features(images, side, copies=2)


def _lpips_features(images: int, side: int, copies: int) -> float:
    slices = enumerate(VGG16)
    values = sum(channels * (side // 2**level) ** 2 for level, (channels, _) in slices)
    return copies * images * values * FP32


def convnext_bytes(images: int) -> float:
    """Bytes that ConvNeXt-S keeps of `images` reconstructions, which it sees at 224 px.

    A block of C channels keeps the results of its convolution (C), of its first linear layer (4 C,
    before GELU) and of its end (C). A stage begins with a convolution and a norm.
    """
    values = 0
    for level, (channels, blocks) in enumerate(CONVNEXT_S):
        pixels = (CONVNEXT_SIDE // FIRST_STRIDE // 2**level) ** 2
        values += (6 * blocks + 2) * channels * pixels
    return images * values * FP32


def discriminator_bytes(config: AdversarialConfig, images: int, side: int, size: int) -> float:
    """Bytes that the discriminator keeps of `images` of `side` x `side` px; `size` is a value's."""
    of_one = _blur_pool if config.discriminator == "blur_pool" else _patch
    return images * of_one(config.channels, config.num_layers, side, size)


def _patch(channels: int, num_layers: int, side: int, size: int) -> float:
    """Each layer keeps the results of convolution, norm and activation; the first has no norm."""
    values, side = 3 * side**2, side // 2
    values += 2 * channels * side**2
    for i in range(1, num_layers + 1):
        side = side // 2 if i < num_layers else side - 1
        values += 3 * channels * min(2**i, 8) * side**2
    return values * size


def _blur_pool(channels: int, num_layers: int, side: int, size: int) -> float:
    """The first layer keeps convolution and activation.

    Each stage keeps its convolution with a border of 1 px around, and blurred, normed and after
    its activation; the end the pooled maps with int64 indices, a convolution and its activation.
    """
    values = (3 + 2 * channels) * side**2
    for i in range(num_layers):
        half, width = math.ceil(side / 2), channels * 2**i
        values += width * (2 * half + 2) ** 2 + 3 * width * half**2
        side = half
    pooled = channels * 2 ** max(num_layers - 1, 0) * POOLED_SIDE**2
    return values * size + pooled * (3 * size + INT64)
