"""One image through a converted folder and through the checkpoint itself: the same codes, pixels.

The bits of the tensors are compared elsewhere. This proves that the folder as a whole is the model:
that it loads by `VQRAE.from_pretrained`, and that no tensor took another's place.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vqrae_ds.conversion.checkpoint_source import describe_source
from vqrae_ds.conversion.consolidate import DTYPES, model_prefix
from vqrae_ds.conversion.free_memory import free_memory
from vqrae_ds.conversion.record import read_record
from vqrae_ds.conversion.zero_shards import ZeroCheckpoint
from vqrae_ds.models.vqrae import VQRAE, read_config
from vqrae_ds.models.weights import set_dtype

_WORKING_BYTES = 1 << 30  # for one tensor as it is read and for the activations of one image


class Answer(NamedTuple):
    """What a model makes of an image: codes (1, h, w) and pixels (1, 3, H, W)."""

    indices_1hw: Tensor
    images_hat_13HW: Tensor


def compare_forward(
    checkpoint: Path, output: Path, *, model_config: Path | None = None
) -> str | None:
    """None where the codes and the pixels of a fixed random image are equal in every bit.

    Where the model does not fit into the memory that this process may take, says so instead. Raises
    `ValueError` where they differ, and where `output` does not load. One model is there at a time.
    """
    record, config = read_record(output), read_config(output)
    source = describe_source(checkpoint, model_config)
    weights = ZeroCheckpoint(source.generator, averages=record.ema)
    prefix = model_prefix(weights)
    stored = weights.tensors[f"{prefix}decoder.head.weight"].dtype
    dtype = DTYPES[record.dtype] if record.kind == "inference" else stored
    with torch.device("meta"):
        model = VQRAE(config=config)
    needed = sum(t.numel() * dtype.itemsize for t in model.state_dict().values()) + _WORKING_BYTES
    if needed > (free := free_memory()):
        return f"it needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free"
    size = config.image_size
    image_13HW = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    converted = _ask(VQRAE.from_pretrained(output), image_13HW)
    original = _ask(_fill(model, weights, prefix, dtype), image_13HW)
    if not torch.equal(converted.indices_1hw, original.indices_1hw):
        differ = (converted.indices_1hw != original.indices_1hw).sum().item()
        raise ValueError(f"{output} gives {differ} other codes than {checkpoint} for one image")
    if not torch.equal(converted.images_hat_13HW, original.images_hat_13HW):
        raise ValueError(f"{output} gives other pixels than {checkpoint} for the same codes")
    return None


def _fill(model: VQRAE, weights: ZeroCheckpoint, prefix: str, dtype: torch.dtype) -> VQRAE:
    """The model, which is on `meta`, with the weights of the checkpoint; buffers stay fp32."""
    set_dtype(model, dtype)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, target in model.state_dict().items():
            target.copy_(weights.read(prefix + name))
    model.quantizer.reset_unsaved_buffers()
    return model.eval()


@torch.no_grad()
def _ask(model: VQRAE, image_13HW: Tensor) -> Answer:
    indices_1hw = model.encode_to_indices(image_13HW)
    return Answer(indices_1hw, model.decode_from_indices(indices_1hw))
