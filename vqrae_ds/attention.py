"""Which implementation of attention a machine can run."""

from __future__ import annotations

import importlib.util
import logging

import torch

logger = logging.getLogger(__name__)

FIRST_CAPABILITY = (8, 0)  # Ampere: what flash-attn 2 is written for


def choose_attention(*, on_gpu: bool, bf16: bool) -> str:
    """The transformers library's name of the encoder's attention; the log says why.

    The decoder always takes PyTorch's, which chooses the fastest kernel by itself.
    """
    logger.info("attention of the decoder: PyTorch's scaled_dot_product_attention")
    obstacle = _obstacle(on_gpu, bf16)
    if obstacle is None:
        logger.info("attention of the encoder: flash_attention_2 (flash-attn is installed)")
        return "flash_attention_2"
    logger.info("attention of the encoder: sdpa (%s)", obstacle)
    return "sdpa"


def _obstacle(on_gpu: bool, bf16: bool) -> str | None:
    """Why flash attention cannot run here."""
    if not (on_gpu and bf16):
        return "flash attention needs CUDA and bf16"
    capability = torch.cuda.get_device_capability()
    if capability < FIRST_CAPABILITY:
        found = ".".join(map(str, capability))
        return f"flash attention needs compute capability 8.0, this GPU has {found}"
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    return None
