"""Pretrained vision encoders behind one small interface: image in [0, 1] -> patch features.

The networks are the transformers library's; here are only what a tokenizer needs around them.

Shapes: B batch, H x W pixels, N = h*w patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLVisionConfig, InternVLVisionModel

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class InternViT(nn.Module):
    """InternViT of any size (github.com/OpenGVLab/InternVL), last layer's patch tokens.

    `config` is the content of `config.json` as transformers' `InternVLVisionModel` has it, and
    `attention` that library's name of the implementation. The published checkpoints end without a
    norm, and so does this with `use_mean_pooling`, the default. `hidden_size` is the width D,
    `patch_size` the side of a patch in pixels.

    Raises `ValueError` for the configuration of another kind of model.
    """

    def __init__(self, config: dict[str, Any], attention: str = "sdpa") -> None:
        super().__init__()
        expected = InternVLVisionConfig.model_type
        model_type = config.get("model_type", expected)
        if model_type != expected:  # the keys of others mean something else, or nothing, here
            raise ValueError(
                f"the encoder's config.json has model_type {model_type!r}; InternViT needs "
                f"{expected!r}, the transformers library's layout"
            )
        self.config = InternVLVisionConfig(**{**config, "attn_implementation": attention})
        self.model = InternVLVisionModel(self.config)
        self.hidden_size = self.config.hidden_size
        self.patch_size = self.config.patch_size[0]

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Features (B, h*w, D) of floating-point images (B, 3, H, W) in [0, 1].

        Raises `ValueError` where a side is no multiple of the patch size, or for another shape.
        """
        _check_images(images_B3HW, self.patch_size)
        pixels_B3HW = _standardize(images_B3HW.float())
        return self.model(pixels_B3HW).last_hidden_state[:, 1:]  # without the class token

    def resets(self) -> Iterator[tuple[nn.Module, Callable[[], None]]]:
        """Each module with parameters of its own, and the call that draws them anew.

        Matrices and kernels are drawn from N(0, initializer_range^2). Biases, class token and
        position embeddings are 0, norms 1, layer scales `layer_scale_init_value`.
        """
        for module in self.model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                yield module, partial(self.model._init_weights, module)


ENCODERS = {"InternViT": InternViT}


def _check_images(images_B3HW: Tensor, patch_size: int) -> None:
    shape = tuple(images_B3HW.shape)
    if len(shape) != 4 or shape[1] != 3 or not images_B3HW.is_floating_point():
        raise ValueError(
            f"images have shape {shape} and {images_B3HW.dtype}; "
            "the encoder takes floats in [0, 1] of shape (B, 3, H, W)"
        )
    H, W = shape[2:]
    if H % patch_size or W % patch_size:
        raise ValueError(
            f"images have {H} x {W} pixels: sides must be multiples of {patch_size}, the patch size"
        )


def _standardize(images_B3HW: Tensor) -> Tensor:
    # Numbers, not buffers: these would be rounded with the parameters of a model in bf16.
    channels = zip(images_B3HW.unbind(1), IMAGENET_MEAN, IMAGENET_STD, strict=True)
    return torch.stack([(x_BHW - mean) / std for x_BHW, mean, std in channels], dim=1)
