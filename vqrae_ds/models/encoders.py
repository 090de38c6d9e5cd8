"""Pretrained vision encoders behind one small interface: image in [0, 1] -> patch features.

The networks are the transformers library's; here is only what a tokenizer needs around them: the
input statistics, a chosen layer, no class or register tokens, any size of image. A new family is a
subclass of `Encoder` and an entry in `ENCODERS`.

Shapes: B batch, H x W pixels, h x w grid of patches, N = h*w patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    InternVLVisionConfig,
    InternVLVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.internvl.modeling_internvl import InternVLVisionEmbeddings
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings

from vqrae_ds.config import ModelConfig, choose_encoder, nearest_multiples
from vqrae_ds.models.activation_checkpointing import Checkpointing, checkpointed
from vqrae_ds.models.positions import resize_positions

MAX_OVERSHOOT = 0.5  # beyond [0, 1]; an image in [-1, 1] or of ImageNet's statistics goes further
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Encoder(nn.Module):
    """What all families share.

    Of the network that the resolved `config` describes, the blocks up to `feature_layer` are built.
    Behind the last block of the network comes the family's own final norm, behind an earlier one
    nothing; with a name in "wNorm" a LayerNorm without learned scale and shift comes instead.
    `attention` is the transformers library's name of the implementation.

    `hidden_size` is the width D, `patch_size` the side of a patch in pixels, `mean` and `std` are
    those of the pixels that the family was trained on.
    """

    mean: ClassVar[tuple[float, float, float]]
    std: ClassVar[tuple[float, float, float]]
    blocks_path: ClassVar[str]  # where `model` keeps its blocks, and its last norm
    norm_path: ClassVar[str]

    def __init__(self, config: ModelConfig, attention: str) -> None:
        super().__init__()
        shape, plain_norm = config.encoder_shape, choose_encoder(config.encoder_cls).plain_norm
        self.hidden_size, self.patch_size = shape.hidden_size, shape.patch_size
        self.num_blocks, self._num_published = config.feature_layer, shape.num_hidden_layers
        changes = {"num_hidden_layers": self.num_blocks, "attn_implementation": attention}
        self.model = self._build({**config.encoder_config, **changes})
        self._drops_norm = False
        if plain_norm or self.num_blocks < self._num_published:
            self._drops_norm = any(True for _ in getattr(self.model, self.norm_path).parameters())
            eps = self.model.config.layer_norm_eps
            plain = nn.LayerNorm(self.hidden_size, eps, elementwise_affine=False)
            setattr(self.model, self.norm_path, plain if plain_norm else nn.Identity())

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Features (B, h*w, D) of floating-point images (B, 3, H, W) in [0, 1].

        Raises `ValueError` where a side is no multiple of the patch size, or for another shape.
        """
        check_images(images_B3HW, self.patch_size)
        channels = zip(images_B3HW.float().unbind(1), self.mean, self.std, strict=True)
        # Numbers, not buffers: these would be rounded with the parameters of a model in bf16.
        pixels_B3HW = torch.stack([(x_BHW - mean) / std for x_BHW, mean, std in channels], dim=1)
        tokens_BND = self._run(pixels_B3HW)
        num_patches = images_B3HW[0, 0].numel() // self.patch_size**2
        return tokens_BND[:, -num_patches:]  # class and register tokens come first

    def set_checkpointing(self, kind: Checkpointing) -> None:
        """What the blocks keep for the backward pass in training mode."""
        self.model._set_gradient_checkpointing(kind != "none", partial(checkpointed, kind=kind))

    def leaves_out(self, name: str) -> bool:
        """Whether a tensor of the whole network belongs to a part that is not built here.

        What the configuration does not describe is no part of it.
        """
        if name.startswith(f"{self.blocks_path}."):
            number = int(name.removeprefix(f"{self.blocks_path}.").split(".")[0])
            return self.num_blocks <= number < self._num_published
        return self._drops_norm and name.startswith(f"{self.norm_path}.")

    def resets(self) -> Iterator[tuple[nn.Module, Callable[[], None]]]:
        """Each module with parameters of its own, and the call that draws them anew.

        The distributions are the transformers library's for the family.
        """
        for module in self.model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                yield module, partial(self.model._init_weights, module)

    def _build(self, config: dict[str, Any]) -> nn.Module:
        raise NotImplementedError

    def _run(self, pixels_B3HW: Tensor) -> Tensor:
        return self.model(pixels_B3HW).last_hidden_state


class InternViT(Encoder):
    """InternViT of any size (github.com/OpenGVLab/InternVL).

    The published checkpoints end without a norm, and so does this with `use_mean_pooling`.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    blocks_path, norm_path = "encoder.layer", "layernorm"

    def _build(self, config: dict[str, Any]) -> nn.Module:
        resolved = InternVLVisionConfig(**{**config, "use_mask_token": False})
        model = InternVLVisionModel(resolved)
        model.embeddings = _InternVLEmbeddings(resolved)
        return model


class SigLIP(Encoder):
    """SigLIP, and SigLIP 2 at fixed resolution, without the pooling head (arXiv:2502.14786)."""

    mean = std = (0.5, 0.5, 0.5)
    blocks_path, norm_path = "encoder.layers", "post_layernorm"

    def _build(self, config: dict[str, Any]) -> nn.Module:
        resolved = SiglipVisionConfig(**{**config, "vision_use_head": False})
        model = SiglipVisionModel(resolved)
        model.embeddings = _SiglipEmbeddings(resolved)
        return model

    def _run(self, pixels_B3HW: Tensor) -> Tensor:
        return self.model(pixels_B3HW, interpolate_pos_encoding=True).last_hidden_state


class DINOv2(Encoder):
    """DINOv2 with and without registers (arXiv:2304.07193, 2309.16588).

    Positions are interpolated as the transformers library does: by size, and with antialiasing for
    the models with registers. The authors' own code scales by a factor with an offset of 0.1 for
    those without, which shifts positions a little.
    """

    mean, std = IMAGENET_MEAN, IMAGENET_STD
    blocks_path, norm_path = "encoder.layer", "layernorm"

    def _build(self, config: dict[str, Any]) -> nn.Module:
        if config["model_type"] == "dinov2":
            return Dinov2Model(Dinov2Config(**{**config, "use_mask_token": False}))
        model = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**config))
        # For pre-training only. As a plain tensor it is neither trained nor stored.
        del model.embeddings.mask_token
        model.embeddings.mask_token = torch.zeros(0)
        return model


ENCODERS: dict[str, type[Encoder]] = {
    "InternViT": InternViT,
    "SigLIP": SigLIP,
    "SigLIP2": SigLIP,
    "DINOv2": DINOv2,
}


def build_encoder(config: ModelConfig, attention: str = "sdpa") -> Encoder:
    """The encoder of a resolved configuration, with random weights."""
    return ENCODERS[choose_encoder(config.encoder_cls).family](config, attention)


class _InternVLEmbeddings(InternVLVisionEmbeddings):
    """The library interpolates in the dtype of the weights."""

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        h, w = height // self.patch_size[0], width // self.patch_size[1]
        class_11D, patches_1ND = self.position_embeddings.split_with_sizes(
            [1, self.position_embeddings.shape[1] - 1], dim=1
        )
        return torch.cat([class_11D, resize_positions(patches_1ND, h, w)], dim=1)


class _SiglipEmbeddings(SiglipVisionEmbeddings):
    """The same, and the table is reached by calling it: ZeRO-3 holds it only while it runs."""

    def interpolate_pos_encoding(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        every_N = torch.arange(self.num_positions, device=embeddings.device)
        positions_1ND = self.position_embedding(every_N)[None]
        return resize_positions(positions_1ND, height // self.patch_size, width // self.patch_size)


def check_range(images_B3HW: Tensor) -> None:
    """Raise `ValueError` for values that are not meant to be in [0, 1]. Reads from the device.

    An image that was resampled may overshoot a little. NaN passes: the codes refuse it.
    """
    if images_B3HW.numel() == 0:
        return
    low, high = (float(value) for value in torch.aminmax(images_B3HW.detach()))
    if low < -MAX_OVERSHOOT or high > 1 + MAX_OVERSHOOT:
        raise ValueError(
            f"images have values from {low:g} to {high:g}, the encoder takes floats in [0, 1]: "
            "divide 0..255 by 255, and take a normalization back"
        )


def check_images(images_B3HW: Tensor, patch_size: int) -> None:
    """Raise `ValueError` unless these are floats (B, 3, H, W) of whole patches."""
    shape = tuple(images_B3HW.shape)
    if len(shape) != 4 or shape[1] != 3 or not images_B3HW.is_floating_point():
        raise ValueError(
            f"images have shape {shape} and {images_B3HW.dtype}; "
            "the encoder takes floats in [0, 1] of shape (B, 3, H, W)"
        )
    H, W = shape[2:]
    if H % patch_size or W % patch_size:
        nearest = " and ".join(
            f"{nearest_multiples(side, patch_size)} for {side}"
            for side in dict.fromkeys((H, W))
            if side % patch_size
        )
        raise ValueError(
            f"images have {H} x {W} pixels: sides must be multiples of {patch_size}, the patch "
            f"size; nearest: {nearest}"
        )
