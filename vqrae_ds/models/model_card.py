"""The README.md of a folder of weights: what the model is and how to use it.

What no program can know is left to be filled in: its name, its data, the encoder that it began
with, its licence. So a card that is there is never written over, and no checksum covers it.
"""

from __future__ import annotations

import logging
import math
from pathlib import Path

from vqrae_ds.config import ModelConfig

logger = logging.getLogger(__name__)

CARD = "README.md"
TO_FILL_IN = "TO FILL IN"

_TEXT = f"""\
# {TO_FILL_IN}: name

A VQRAE image tokenizer (arXiv:2511.23386): continuous features for understanding, discrete codes
for generation, and images from the codes. Trained with `vqrae_ds`.

| | |
|---|---|
| encoder | {{encoder}} |
| codebook | {{codebook}}, {{bits:.4g}} bits a token |
| decoder | {{decoder}} |
| image size in training | {{size}} x {{size}} pixels |
| tokens an image | {{side}} x {{side}} = {{tokens}}, one for {{q}} x {{q}} pixels |
| compression | {{compression:.4g}} times, of 24 bits a pixel |

## Use

It needs the package `vqrae_ds`, and not `deepspeed`. The weights are safetensors.

```python
import torch
from vqrae_ds import VQRAE

model = VQRAE.from_pretrained("PATH")           # this folder
images = torch.rand(1, 3, {{size}}, {{size}})         # (B, 3, H, W) in [0, 1]
with torch.no_grad():
    features = model.encode(images)             # (B, {{tokens}}, {{width}}) continuous
    indices = model.encode_to_indices(images)   # (B, {{side}}, {{side}}) int64, 0 to {{last}}
    images_hat = model.decode_from_indices(indices)   # (B, 3, {{size}}, {{size}}) in [0, 1]
```

Both sides of an image are multiples of {{q}} pixels, else it is refused. Other sizes than that of
the training are taken, with position embeddings interpolated.

## Quality

{TO_FILL_IN}: the report of `tools/evaluate.py`, and the set that it was made on.

## Training data

{TO_FILL_IN}: the images, their number and source, and what was left out.

## Encoder

{TO_FILL_IN}: the published weights that the training began with. Where it began without any
(`init.allow_untrained_encoder`), say that the encoder was UNTRAINED: its features then mean nothing
to a language model.

## Licence

{TO_FILL_IN}: of these weights.

{TO_FILL_IN}: of the encoder that the training began with; what its publisher asks holds here too.
"""


def model_card(config: ModelConfig) -> str:
    """The text of a card, in Markdown. `config` is resolved (`resolve_model`)."""
    shape, decoder = config.encoder_shape, config.decoder
    side, q, bits = config.grid_side, config.output_patch_size, math.log2(config.num_embeddings)
    kind = "SimVQ" if config.use_simvq else "moving averages"
    return _TEXT.format(
        encoder=f"{config.encoder_cls}: {config.feature_layer} blocks x {shape.hidden_size}, "
        f"{shape.num_attention_heads} heads, patches of {shape.patch_size} pixels",
        codebook=f"{kind}: {config.num_embeddings} codes of {config.embedding_dim} dimensions",
        decoder=f"ViT: {decoder.num_layers} blocks x {decoder.hidden_size}, "
        f"{decoder.num_heads} heads",
        bits=bits,
        size=config.image_size,
        side=side,
        tokens=side**2,
        q=q,
        compression=24 * q**2 / bits,
        width=shape.hidden_size,
        last=config.num_embeddings - 1,
    )


def write_model_card(folder: Path, config: ModelConfig) -> None:
    """Write the card of a resolved `config` into `folder`, unless one is there."""
    path = Path(folder) / CARD
    if path.exists():
        logger.info("%s is there already, and is left as it is", path)
        return
    path.write_text(model_card(config))
