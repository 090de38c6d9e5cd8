"""What one rank measures on one batch of a set: the figures of each image, its codes and features.

The protocol, the same for all figures: the largest centre square of an image, resized to the side S
by an antialiased bicubic filter in 8 bit (`data/decode.py`); the reconstruction is clamped to
[0, 1] and rounded to 8 bit; both are compared as 8-bit images.

Shapes: B batch, n of them that count, S side, N tokens, D encoder width, F Inception's features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vqrae_ds.data.decode import as_bytes
from vqrae_ds.data.stream import EvaluationBatch
from vqrae_ds.evaluation.metrics import image_figures
from vqrae_ds.losses.distillation import feature_cosine
from vqrae_ds.models.encoders import Encoder
from vqrae_ds.models.finite import check_finite
from vqrae_ds.models.vqrae import VQRAE

TRAINED, ORIGINAL = "model", "original"  # whose features


class Instruments(NamedTuple):
    """The model, and what measures it; all on one device, in evaluation mode."""

    model: VQRAE
    original: Encoder | None  # the encoder before it was trained
    perceptual: Callable[[Tensor, Tensor], Tensor] | None
    inception: Callable[[Tensor], Tensor] | None


class InceptionFeatures(NamedTuple):
    """Of the images and of their reconstructions, fp32."""

    images_nF: Tensor
    images_hat_nF: Tensor


class Measured(NamedTuple):
    """A batch without what filled it up, on the CPU.

    `figures` are float64 values of each image by name; `pooled` (n, D) are the features of the
    model and, where there is one, of the original encoder, mean over the tokens of an image.
    """

    numbers_n: Tensor  # int64, positions in the index
    figures: dict[str, Tensor]
    is_same_n: Tensor  # bool: equal to the original in every 8-bit value
    indices_nN: Tensor  # int32
    pooled: dict[str, Tensor]
    inception: InceptionFeatures | None


class Reconstructed(NamedTuple):
    """8-bit images (B, 3, S, S) as floats in [0, 1], and what lay between them."""

    images_hat_B3SS: Tensor
    features_BND: Tensor
    indices_BN: Tensor


@torch.no_grad()
def reconstruct(model: VQRAE, images_B3SS: Tensor) -> Reconstructed:
    """Images of floats in [0, 1] -> codes -> 8-bit images.

    Raises `ValueError` where the features, or what becomes of their codes, are not finite.
    """
    output = model(images_B3SS)
    model.quantizer.check_finite(output.z_BNE)
    check_finite(output.patches_BhwP, "the decoder's output")
    images_hat = as_bytes(output.reconstruction).float() / 255
    return Reconstructed(images_hat, output.features_BND, output.indices_Bhw.flatten(1))


@torch.no_grad()
def measure(instruments: Instruments, batch: EvaluationBatch, limit: int) -> Measured:
    """The images of a batch, of which those from number `limit` on do not count.

    Raises `ValueError` as `reconstruct` does, and for features of the original encoder or of
    Inception that are not finite.
    """
    model, device = instruments.model, next(instruments.model.parameters()).device
    counts_B = batch.is_real_B & (batch.numbers_B < limit)
    images = batch.images_B3HW.to(device)
    found = reconstruct(model, images)
    figures = dict(image_figures(found.images_hat_B3SS, images, instruments.perceptual))
    pooled = {TRAINED: _pooled(found.features_BND)}
    if instruments.original is not None:
        first_BND = instruments.original(model.resize_for_encoder(images))
        check_finite(first_BND, "the original encoder's output")
        figures["cosine"] = feature_cosine(found.features_BND, first_BND)
        difference_BND = found.features_BND.float() - first_BND.float()
        figures["l2"] = difference_BND.square().mean((1, 2))
        pooled[ORIGINAL] = _pooled(first_BND)
    bytes_B, bytes_hat_B = as_bytes(images), as_bytes(found.images_hat_B3SS)
    inception = None
    if instruments.inception is not None:
        sides = (instruments.inception(side).cpu()[counts_B] for side in (bytes_B, bytes_hat_B))
        inception = InceptionFeatures(*sides)
        for features_nF in inception:
            check_finite(features_nF, "Inception's output")
    return Measured(
        numbers_n=batch.numbers_B[counts_B],
        figures={name: value_B.double().cpu()[counts_B] for name, value_B in figures.items()},
        is_same_n=(bytes_B == bytes_hat_B).flatten(1).all(1).cpu()[counts_B],
        indices_nN=found.indices_BN.cpu()[counts_B].int(),
        pooled={name: value_BD.cpu()[counts_B] for name, value_BD in pooled.items()},
        inception=inception,
    )


def _pooled(features_BND: Tensor) -> Tensor:
    return features_BND.float().mean(1)  # (B, D)
