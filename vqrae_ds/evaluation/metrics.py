"""Figures of single images, and their means over a validation set that is spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vqrae_ds.data.stream import EvaluationBatch
from vqrae_ds.losses.distillation import feature_cosine


class Validation(NamedTuple):
    """Means over the set by name; the first images and their reconstructions, in [0, 1]."""

    figures: dict[str, float]
    images_B3HW: Tensor
    images_hat_B3HW: Tensor


def psnr(images_hat_B3HW: Tensor, images_B3HW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, (B,); images in [0, 1], infinite if equal."""
    error_B = (images_hat_B3HW.double() - images_B3HW.double()).square().mean((1, 2, 3))
    return -10 * error_B.log10()


def mean_colour(images_B3HW: Tensor) -> Tensor:
    """Each image replaced by its mean colour: the reconstruction that needs no tokenizer."""
    return images_B3HW.mean((2, 3), keepdim=True).expand_as(images_B3HW)


@torch.no_grad()
def validate(
    engine: nn.Module,
    batches: Iterable[EvaluationBatch],
    perceptual: Callable[[Tensor, Tensor], Tensor] | None,
    device: torch.device,
) -> Validation:
    """One pass over the validation set; every rank calls it, with equally many batches.

    Codes are counted for the training alone, so those of the pass are taken back.
    """
    quantizer = engine.module.vqrae.quantizer
    counts_before, first = quantizer.code_counts.clone(), None
    engine.eval()
    sums: dict[str, Tensor] = {}
    num_images = torch.zeros((), dtype=torch.float64, device=device)
    for batch in batches:
        images = batch.images_B3HW.to(device)
        output = engine(images)
        images_hat = output.vqrae.reconstruction
        first = first or (images, images_hat)
        is_real_B = batch.is_real_B.to(device)  # the others fill up the batch and count for nothing
        num_images += is_real_B.sum()
        for name, value_B in _figures(output, images_hat, images, perceptual):
            sums[name] = sums.get(name, 0) + value_B[is_real_B].double().sum()
    engine.train()
    quantizer.code_counts.copy_(counts_before)
    assert first is not None, "the validation set is empty"
    totals = torch.stack([num_images, *sums.values()])
    dist.all_reduce(totals)
    means = (totals[1:] / totals[0]).tolist()
    return Validation(dict(zip(sums, means, strict=True)), *first)


def _figures(
    output: NamedTuple, images_hat: Tensor, images: Tensor, perceptual: Callable | None
) -> Iterator[tuple[str, Tensor]]:
    yield "validation/psnr", psnr(images_hat, images)
    yield "validation/baseline_psnr", psnr(mean_colour(images), images)
    if perceptual is not None:
        yield "validation/lpips", perceptual(images_hat, images)
    if output.teacher_features_BND is not None:
        cosine = feature_cosine(output.vqrae.features_BND, output.teacher_features_BND)
        yield "validation/teacher_cosine", cosine
