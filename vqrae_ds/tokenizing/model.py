"""The halves of a tokenizer on a device: one makes codes, the other makes images of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from vqrae_ds.attention import choose_attention
from vqrae_ds.models.vqrae import VQRAE
from vqrae_ds.models.weights import DTYPES, set_dtype
from vqrae_ds.ops.code_search import choose_search


def load_for_encoding(folder: Path, device: torch.device, dtype: str) -> Callable[[Tensor], Tensor]:
    """Images (B, 3, H, W) in [0, 1] on any device -> codes (B, h, w) int64 on `device`.

    The decoder stays on the CPU, where nobody asks for it: it is as large as the encoder. Raises
    `ValueError` for a folder that is no tokenizer.
    """
    on_gpu = device.type == "cuda"
    attention = choose_attention(on_gpu=on_gpu, bf16=dtype == "bf16")
    model = VQRAE.from_pretrained(folder, attention=attention)
    model.quantizer.search = choose_search(on_gpu=on_gpu)
    _move((model.encoder, model.standardize, model.in_proj, model.quantizer), device, dtype)
    model.quantizer.keep_codes()  # no weight changes here

    def encode(images_B3HW: Tensor) -> Tensor:
        return model.encode_to_indices(images_B3HW.to(device, non_blocking=True))

    return encode


def load_for_decoding(folder: Path, device: torch.device, dtype: str) -> Callable[[Tensor], Tensor]:
    """Codes (B, h, w) int64 -> images (B, 3, h*q, w*q) in [0, 1], fp32, both as above.

    What comes back raises `ValueError` where the decoder's output is not finite.
    """
    model = VQRAE.from_pretrained(folder)
    _move((model.quantizer, model.out_proj, model.decoder), device, dtype)

    @torch.no_grad()
    def decode(indices_Bhw: Tensor) -> Tensor:
        return model.decode_from_indices(indices_Bhw.to(device))

    return decode


def default_dtype(device: torch.device) -> str:
    """bf16 on a GPU, fp32 on a CPU."""
    return "bf16" if device.type == "cuda" else "fp32"


def _move(parts: tuple[nn.Module, ...], device: torch.device, dtype: str) -> None:
    """Parameters to `dtype`, as `from_pretrained` has them; buffers stay fp32."""
    for part in parts:
        set_dtype(part, DTYPES[dtype])
        part.to(device)
