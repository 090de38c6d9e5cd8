"""A small encoder of each family: its configuration in the transformers library's layout."""

from __future__ import annotations

from typing import Any

import torch

from vqrae_ds.config import ModelConfig, resolve_model
from vqrae_ds.models.encoders import Encoder, build_encoder

WIDTH, BLOCKS = 32, 3
_SHAPE = {"hidden_size": WIDTH, "num_hidden_layers": BLOCKS, "num_attention_heads": 4}

_INTERNVIT_6B = {
    "model_type": "internvl_vision",
    **_SHAPE,
    "intermediate_size": 64,
    "image_size": [224, 224],
    "patch_size": [14, 14],
    "attention_bias": False,
    "use_qk_norm": True,
    "norm_type": "rms_norm",
    "use_mean_pooling": True,
}
_INTERNVIT_300M = {
    **_INTERNVIT_6B,
    "image_size": [448, 448],
    "attention_bias": True,
    "use_qk_norm": False,
    "norm_type": "layer_norm",
}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {  # encoder_cls, config.json
    "internvit_6b": ("InternViT", _INTERNVIT_6B),
    "internvit_300m": ("InternViT", _INTERNVIT_300M),
    "siglip": (
        "SigLIP",
        {
            "model_type": "siglip_vision_model",
            **_SHAPE,
            "intermediate_size": 64,
            "image_size": 256,
            "patch_size": 16,
        },
    ),
    "dinov2": (
        "DINOv2",
        {"model_type": "dinov2", **_SHAPE, "mlp_ratio": 2, "image_size": 518, "patch_size": 14},
    ),
    "dinov2_with_registers": (
        "DINOv2",
        {
            "model_type": "dinov2_with_registers",
            **_SHAPE,
            "mlp_ratio": 2,
            "image_size": 518,
            "patch_size": 14,
            "num_register_tokens": 4,
        },
    ),
}


def model_config(family: str, *, plain_norm: bool = False, **options: Any) -> ModelConfig:
    """A resolved configuration of a small tokenizer on this family."""
    encoder_cls, encoder = FAMILIES[family]
    defaults = {"num_embeddings": 64, "embedding_dim": 16}
    return resolve_model(
        ModelConfig(
            encoder_cls=encoder_cls + ("wNorm" if plain_norm else ""),
            encoder_config=encoder,
            **defaults | options,
        )
    )


def small_encoder(family: str, **options: Any) -> Encoder:
    """The encoder with every parameter random, so that no part can be left out unnoticed."""
    torch.manual_seed(0)
    encoder = build_encoder(model_config(family, **options)).eval()
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            is_scale = "norm" in name and name.endswith("weight")
            parameter.normal_(mean=float(is_scale), std=0.1)
    return encoder
