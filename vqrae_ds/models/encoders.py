"""Pretrained vision encoders behind one small interface: image in [0, 1] -> patch features.

The networks are the transformers library's; here are only what a tokenizer needs around them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import InternVLVisionConfig, InternVLVisionModel

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class InternViT(nn.Module):
    """InternViT of any size (github.com/OpenGVLab/InternVL), last layer's patch tokens.

    The published checkpoints end without a norm and pool by the mean, so `use_mean_pooling` keeps the class's
    last norm an identity. `hidden_size` is the width D, `patch_size` the side of a patch in pixels.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, config: dict[str, Any], attention: str = "sdpa") -> None:
        super().__init__()
        known = {k: v for k, v in config.items() if k != "model_type"}
        self.config = InternVLVisionConfig(**known, attn_implementation=attention)
        self.model = InternVLVisionModel(self.config)
        self.hidden_size = self.config.hidden_size
        self.patch_size = self.config.patch_size[0]
        self.register_buffer(
            "image_mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False
        )
        self.register_buffer(
            "image_std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False
        )

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Features (B, h*w, D) of images in [0, 1] whose sides are multiples of the patch size."""
        H, W = images_B3HW.shape[-2:]
        if H % self.patch_size or W % self.patch_size:
            raise ValueError(
                f"image of {H} x {W} pixels: sides must be multiples of {self.patch_size}"
            )
        pixels_B3HW = (images_B3HW.float() - self.image_mean) / self.image_std
        return self.model(pixels_B3HW).last_hidden_state[:, 1:]  # without the class token

    def resets(self) -> Iterator[tuple[nn.Module, Callable[[], None]]]:
        """Each module with the call that draws its own parameters anew."""
        for module in self.model.modules():
            yield module, lambda module=module: self.model._init_weights(module)


ENCODERS = {"InternViT": InternViT}
